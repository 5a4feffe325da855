"""`python -m convert`: Hugging Face checkpoints to our Orbax format and back, looked into and compared."""
