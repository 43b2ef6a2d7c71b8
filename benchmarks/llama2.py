"""The public shapes of Llama 2, for tests and measurements that need no trained weights."""

from transformers import LlamaConfig

# hidden, intermediate, layers, heads, key and value heads: Touvron et al. 2023, arXiv 2307.09288
SIZES = {
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}


def llama2_config(size: str = "7B") -> LlamaConfig:
    """The LlamaConfig of "7B", "13B" or "70B"."""
    hidden, inner, layers, heads, key_heads = SIZES[size]
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
