"""Small tokenizers of the form of Llama 2's, for tests: a blank before every text, bytes for what is not known."""

import tokenizers as library

BLANK = "\u2581"
"""Stands for a blank within such a tokenizer."""


def sentence_piece(normalizer: object = None, pre_tokenizer: object = None) -> str:
    """Its JSON text."""
    letters = f"{BLANK}acehmnost"
    vocabulary = dict.fromkeys(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters])
    merges = [("t", "h"), ("th", "e"), (BLANK, "the"), ("a", "t"), ("c", "at"), (BLANK, "cat")]
    vocabulary |= dict.fromkeys("".join(pair) for pair in merges)
    peer = library.Tokenizer(
        library.models.BPE(
            {name: number for number, name in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    if normalizer is not None:
        peer.normalizer = normalizer
    if pre_tokenizer is not None:
        peer.pre_tokenizer = pre_tokenizer
    decoders = library.decoders
    peer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    peer.add_special_tokens(["<unk>", "<s>", "</s>"])
    peer.post_processor = library.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return peer.to_str()


PREPENDING = sentence_piece(
    library.normalizers.Sequence([library.normalizers.Prepend(BLANK), library.normalizers.Replace(" ", BLANK)])
)
METASPACE = sentence_piece(None, library.pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
