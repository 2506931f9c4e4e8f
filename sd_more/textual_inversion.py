"""Textual inversion: words for what no word says (Gal et al. 2022, arXiv 2208.01618).

It leaves a model alone and learns vectors that the text model is given in place of a token's. Here
they are put at the end of its table of vectors, and the tokenizer knows their ids by name.

    changes = [textual_inversion("cat-toy.flat.safetensors")]
    sd = StableDiffusion("model.flat.safetensors", changes=changes)
"""

from dataclasses import replace

import mlx.core as mx

from sd import SDError, read_flat


def textual_inversion(path):
    """A change for StableDiffusion(changes=[...]). path: a flat file; its words stand for its
    vectors from now on. Raises SDError.
    """

    def change(config, weights):
        name, words = "text_encoder.token_embedding.weight", dict(config.words)
        for word, vectors in read_flat(path, "words")[1].items():
            table = weights[name]
            if vectors.shape[1:] != table.shape[1:] or not len(vectors):
                raise SDError(
                    f"{path} is for another text model: its vectors are {vectors.shape}, here "
                    f"they have {table.shape[1]} numbers."
                )
            words[word] = list(range(len(table), len(table) + len(vectors)))
            both = table.astype(mx.float32), vectors.astype(mx.float32)
            weights = weights | {name: mx.concatenate(both)}
        text = config.text | {"vocabulary": len(weights[name])}
        return replace(config, text=text, words=words), weights

    return change
