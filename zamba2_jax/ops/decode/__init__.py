"""The operations of one decoding step."""
