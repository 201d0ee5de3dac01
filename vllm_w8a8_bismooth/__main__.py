from vllm_w8a8_bismooth.cli import main

main()
