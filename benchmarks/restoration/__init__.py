"""Adapters that teach a trained network to undo damage that it does not know, and the same training
in torch with lycoris-lora beside it.

    python -m benchmarks.restoration --out DIR [--torch]
    python -m benchmarks.restoration.table [FILE]

The network, the photographs and the damage (scan lines, 6 % of salt and pepper) are those of
`lycoris-cupy demo`, from the packages of the extra `demo`.
"""
