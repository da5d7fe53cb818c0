"""Every family of PEFT's methods that is read and written."""

from __future__ import annotations

from .adalora import AdaLora
from .family import Family
from .glora import GLora
from .ia3 import Ia3
from .lora import Lora
from .lycoris import Loha, Lokr
from .modules import Beft, LnTuning
from .orthogonal import Boft, Hra, Oft, Road
from .poly import PolySkills
from .prompts import AdaptionPrompt, PrefixTuning, SoftPrompts
from .tokens import Tokens
from .vblora import VbLora
from .vera import Vera

# what an adapter is written as is decided by the first family that claims one of its methods: `full` is claimed last
_ALL: tuple[Family, ...] = (
    Lora(),
    AdaLora(),
    Ia3(),
    Vera(),
    Loha(),
    Lokr(),
    GLora(),
    VbLora(),
    PolySkills(),
    Oft(),
    Boft(),
    Hra(),
    Road(),
    SoftPrompts("PROMPT_TUNING"),
    SoftPrompts("P_TUNING"),
    PrefixTuning(),
    AdaptionPrompt(),
    Tokens(),
    Beft(),
    LnTuning(),
)
FAMILIES = {family.peft_type: family for family in _ALL}
