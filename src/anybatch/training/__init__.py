"""What a training loop needs of the layers."""

from .attach import attach as attach
from .groups import param_groups as param_groups
from .history import history_state_dict as history_state_dict
from .history import load_history_state_dict as load_history_state_dict

__all__ = ["attach", "history_state_dict", "load_history_state_dict", "param_groups"]
