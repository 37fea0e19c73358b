"""Senri as a Hugging Face model. Importing this registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from senri.hf.cache import SenriCache
from senri.hf.configuration_senri import SenriConfig
from senri.hf.model import SenriModel
from senri.hf.modeling_senri import SenriForCausalLM

AutoConfig.register("senri", SenriConfig, exist_ok=True)
AutoModel.register(SenriConfig, SenriModel, exist_ok=True)
AutoModelForCausalLM.register(SenriConfig, SenriForCausalLM, exist_ok=True)

__all__ = ["SenriCache", "SenriConfig", "SenriForCausalLM", "SenriModel"]
