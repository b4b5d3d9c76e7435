"""Define model families: settings of the Transformer, and tensor names of Hugging Face checkpoints.

Each module of this folder defines the family with the module's name, by three variables:

- `FLAGS`: fields of ModelConfig that all sizes of the family share.
- `SIZES`: fields of ModelConfig for each named preset.
- `BRIDGE`: a `hf_names.Bridge`, if checkpoints of this family exist in the Hugging Face format.

Example:
    >>> from llmctl.model.config import family
    >>> llama = family("llama")
    >>> llama.FLAGS["norm"], llama.SIZES["llama-tiny"]["d_model"], llama.BRIDGE.model_type
    ('rms', 128, 'llama')
"""
