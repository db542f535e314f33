"""The GPU tier, in Triton: the kernels, the plan that cuts a tensor for them, and their launch."""

try:
    import triton.language  # noqa: F401
except Exception as error:  # a triton that does not fit the machine raises what it likes
    raise ImportError(
        "the GPU kernels need triton, which has packages for Linux only (it comes with torch's "
        "CUDA builds); backend='cpu' or 'reference' does without. Importing it: "
        f"{type(error).__name__}: {error}",
        name="triton",
    ) from error
