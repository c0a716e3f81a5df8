"""A second plug-in, of the tests alone: without it, vLLM's JAX backend starts on TPUs only.

It is found by its folder `vl2_on_cpu-0.dist-info` where this folder is on `PYTHONPATH`.
"""

MEMORY = 1 << 29  # of a device, for weights and cache


def patch() -> None:
    """No options for the TPU's compiler, and a device whose memory is known."""
    from tpu_inference import utils
    from tpu_inference.models.common import compiler_options, model_loader

    for module in (compiler_options, model_loader):
        module.get_step_fn_compiler_options = dict
    compiler_options.get_sampling_compiler_options = dict
    utils.get_device_hbm_limit = lambda: MEMORY
