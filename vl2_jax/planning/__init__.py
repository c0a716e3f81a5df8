"""What a model needs of a TPU slice, asked of the TPU compiler itself; no TPU is needed for it."""
