"""The published configurations of the models in the presets."""

from transformers import PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

QWEN: dict[str, PretrainedConfig] = {
    "Qwen/Qwen2.5-Math-1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        intermediate_size=8960, tie_word_embeddings=True, max_position_embeddings=4096),
    "Qwen/Qwen2.5-Math-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, tie_word_embeddings=False, max_position_embeddings=4096),
    "Qwen/Qwen3-4B": Qwen3Config(
        vocab_size=151936, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=9728, tie_word_embeddings=True, max_position_embeddings=40960),
    "Qwen/Qwen3-8B": Qwen3Config(
        vocab_size=151936, hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=12288, tie_word_embeddings=False, max_position_embeddings=40960),
    "Qwen/Qwen3-30B-A3B": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        tie_word_embeddings=False, max_position_embeddings=40960),
}  # fmt: skip
