"""How the small model that zamba2_jax ships was made: its text, its tokenizer, what it is compared with, its card.

`train/presets/demo.toml` opens with the commands, in order.
"""
