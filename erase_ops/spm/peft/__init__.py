"""SPM as a PEFT method: `peft.get_peft_model(unet, SPMConfig(...))`, several adapters, merging, saving and loading.

Importing this package registers the method with PEFT, which has no list of third-party methods: without the import,
PEFT cannot read a configuration of type "SPM".
"""

from expunge.erase_ops.spm.peft.config import SPMConfig
from expunge.erase_ops.spm.peft.convert import export_spm, load_spm
from expunge.erase_ops.spm.peft.layer import SPMLayer
from expunge.erase_ops.spm.peft.model import SPMModel
from expunge.erase_ops.spm.peft.registration import register

register()

__all__ = ["SPMConfig", "SPMLayer", "SPMModel", "export_spm", "load_spm", "register"]
