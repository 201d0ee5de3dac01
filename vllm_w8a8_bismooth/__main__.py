from vllm_w8a8_bismooth.cli.main import main

main()
