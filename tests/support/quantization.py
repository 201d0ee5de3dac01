"""Values of ``quantization_config``, and the class that vLLM parses ours with."""

from hypothesis import strategies as st

from vllm_w8a8_bismooth import register

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def config_class():
    """What vLLM finds in its table."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    return get_quantization_config("w8a8_bismooth")


W8A8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
TOKEN = W8A8 | {"strategy": "token", "dynamic": True}
STOCK = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"g": {"weights": W8A8, "input_activations": TOKEN}},
}
ROWS = STOCK | {
    "quant_method": "w8a8_bismooth",
    "format": "int4-int8-rows",
    "bismooth": {"rows": {"bits": 4.5, "group_size": 128}},
}
