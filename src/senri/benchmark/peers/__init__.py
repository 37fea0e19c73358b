"""Other systems in the same run: one file each, with ``measure(tokens, decode, repeats)``.

The dictionary it returns holds ``name``, ``tokens``, ``seconds`` (of reading that many tokens of a real text, one for
each repeat), ``decode_seconds`` (of decoding ``decode`` tokens after them; empty where there is nothing to decode),
``state_bytes`` and ``note`` (what exactly was run). A memory layer alone, no language model, has a race with Senri's
layer of the same rule and shape: ``senri_seconds``, ``senri_state_bytes``, ``senri_note``. The harness adds
``peak_bytes`` where a peer does not say it. What ``measure`` raises leaves the peer out, with its message.
"""
