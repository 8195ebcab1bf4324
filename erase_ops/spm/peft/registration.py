"""Tells PEFT about the SPM method. PEFT's list of methods is a closed enumeration, which is extended by one member."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from expunge.erase_ops.spm.peft.config import METHOD, SPMConfig
from expunge.erase_ops.spm.peft.model import SPMModel
from expunge.errors import UnsupportedOperationError


def register() -> None:
    """Registers the method; a second call does nothing.

    Raises:
        UnsupportedOperationError: if PEFT has a method of that name from elsewhere.
    """
    if METHOD not in PeftType.__members__:
        _extend(METHOD)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[METHOD])
    if known is None:
        register_peft_method(name=METHOD.lower(), config_cls=SPMConfig, model_cls=SPMModel)
    elif known is not SPMConfig:
        raise UnsupportedOperationError(
            f"PEFT method {METHOD}",
            expected="a name that is free",
            found=f"{known.__module__}.{known.__qualname__}",
            fix="Use that method, or expunge.erase, which does not need PEFT's.",
        )


def _extend(name: str) -> None:
    """Adds a member to the enumeration, which behaves as the others do (call, item, iteration, pickle, deepcopy)."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)  # EnumType's own refuses nothing here, but may in a later Python
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
