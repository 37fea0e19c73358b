"""Convert a Qwen2 model to Senri: ``python scripts/convert_qwen_to_senri.py SOURCE OUT``.

SOURCE is a directory, a hub name or a .gguf file; OUT a new directory.
"""

import sys
from pathlib import Path

from senri import convert_qwen_to_senri
from senri.hf.base import load_tokenizer, new_folder


def main() -> None:
    """Convert and save the model with its tokenizer."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, output = sys.argv[1], Path(sys.argv[2])
    if output.exists():
        sys.exit(f"{output} exists: name another folder")
    try:
        model = convert_qwen_to_senri(source)
        tokenizer = load_tokenizer(source)
    except ValueError as error:
        sys.exit(str(error))
    with new_folder(output) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    print(f"saved {output}: memory in layers {model.config.memory_layers}")


if __name__ == "__main__":
    main()
