"""zipvl inside lmms-eval, which finds this through the entry point `lmms_eval.models`.

Nothing here imports torch, zipvl's engine or lmms-eval: it is imported at the start of every run of
lmms-eval that this package is installed beside.
"""

from typing import Any


def manifest() -> Any:
    """What lmms-eval's registry needs to know: the name, and where the class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("zipvl", chat_class_path="zipvl.lmms.model.ZipvlModel")
