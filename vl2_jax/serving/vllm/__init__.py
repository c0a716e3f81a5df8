"""A plug-in for vLLM's engine on TPUs: its scheduler, cache, kernels and server around this project's model.

    vllm.general_plugins --> plugin.register --> model       its interface around `VL2Model`
                                                 prompts     messages to ids, as released
                                                 pictures    pictures to tiles and places in the prompt
    vl2 serve --engine vllm --> launch           sets what must be set, and becomes `vllm serve`
    vl2 batch               --> batch            the same engine in actors of Ray Data, over rows of files

All that is taken from vLLM is imported in `theirs`, for its packages are being renamed. Importing this package imports
none of it.
"""
