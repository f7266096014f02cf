"""For trust_remote_code=True: the classes of this model are those of the package dflow."""

try:
    from dflow.hf import DflowConfig, DflowForCausalLM, DflowModel
except ImportError as error:
    raise ImportError(
        "this model is one of dflow (text generation with discrete normalizing flows), which is not "
        "installed here; install it: git clone REPOSITORY dflow && python -m pip install ./dflow"
    ) from error
