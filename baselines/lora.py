"""LoRA: low-rank adapters on all linear layers, everything else frozen (Hu et al., arXiv 2106.09685), by peft.

lora_next_token    adapters trained by next-token prediction
lora_mutor         mutor with `trunk: lora`: adapters and registers trained by MuToR
"""

from __future__ import annotations

from dataclasses import dataclass

from mutor.checks import setting
from mutor.mtp.mutor import MuToR, MuToRConfig
from mutor.mtp.settings import AdapterSettings, TrunkSettings

from .next_token import NextToken


class LoRANextToken(NextToken):
    """Next-token prediction with adapters."""

    Config = AdapterSettings
    config: AdapterSettings
    source = "Hu et al., arXiv 2106.09685"
    adds = "adapters"
    at_inference = "the plain model, adapters merged"

    @property
    def trunk_settings(self) -> TrunkSettings:
        """Adapters of this rank and scale."""
        return TrunkSettings(trunk="lora", rank=self.config.rank, lora_alpha=self.config.lora_alpha)


@dataclass(frozen=True)
class LoRAMuToRConfig(MuToRConfig):
    """Settings of MuToR and of the adapters."""

    trunk: str = setting("lora", doc="what makes it lora_mutor; mutor has the others", choices=("lora",))


class LoRAMuToR(MuToR):
    """MuToR with adapters: they and the register are trained, nothing else."""

    Config = LoRAMuToRConfig
    source = f"{LoRANextToken.source}; {MuToR.source}"
    adds = f"adapters, {MuToR.adds}"
    at_inference = LoRANextToken.at_inference
