"""Models in and out: `python hf.py export X.pt DIR` writes one for transformers, and `python hf.py
import DIR|NAME|FILE OUT.pt` makes a checkpoint of weights of Hugging Face, nanoGPT or llm.c.
"""

import settings.before_torch  # noqa: F401  # before torch loads

from conversion.commands import ConversionSettings, run_command
from runtime.flags import parse_flags
from runtime.run_script import run_script

if __name__ == "__main__":
    run_script(
        lambda argv: run_command(
            ConversionSettings(**parse_flags(ConversionSettings, "hf.py", argv))
        )
    )
