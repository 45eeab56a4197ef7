"""The torch implementations of the same adapters, measured beside the project: lycoris-lora with
its fused kernels, and peft. One process a shape, so that their tuners and compilers start afresh.
"""
