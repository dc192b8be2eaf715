"""What XLA launches at once on a GPU, as CUDA graphs; other backends ignore these options.

A program of an engine is hundreds of kernels of a few microseconds, and a launch takes as long.
"""

# No unrolled loops: jaxlib 0.11.2 fails to record one that has a loop inside, as the XLA forms of
# operations have.
_GRAPHED = "FUSION CUBLAS CUBLASLT CUDNN CUSTOM_CALL DYNAMIC_SLICE_FUSION WHILE"


def _options(graphed: str) -> dict[str, str | bool | int]:
    return {
        "xla_gpu_enable_command_buffer": graphed.replace(" ", ","),
        "xla_gpu_command_buffer_unroll_loops": False,
        "xla_gpu_graph_min_graph_size": 2,
    }


# All of a program, so that the host need not wait for the device at its conditionals.
WHOLE = _options(f"{_GRAPHED} CONDITIONAL")
# For decoding, where a step with them inside is slower by 0.1 of 1.5 ms.
BETWEEN_CONDITIONALS = _options(_GRAPHED)
