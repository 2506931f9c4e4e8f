"""Prompts with brackets, weights and more than 75 tokens, as AUTOMATIC1111's program reads them."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import sd
from sd_more.prompts import parse_weights, read_weighted, show_tokens, split_chunks
from sd_more.textual_inversion import textual_inversion
from tests.reference import assert_close, scheduler, write_file

WIDTH = 40  # of the miniature's context


@pytest.fixture(scope="module")
def weighing():
    return sd.StableDiffusion(reader=read_weighted)


@pytest.mark.parametrize(
    "prompt, pieces",
    [  # the first eight are the examples in AUTOMATIC1111's own documentation of its parser
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1),
                ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1),
            ],
        ),
        ("a cat BREAK a dog", [("a cat", 1.0), ("BREAK", None), ("a dog", 1.0)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
        ("a) b] c:1.3) 10:30", [("a) b] c:1.3) 10:30", 1.0)]),
        (r"\\ \( \n", [(r"\ ( \n", 1.0)]),
        ("", []),
        ("((((((", []),
        ("(a:0)", [("a", 0.0)]),
        ("(a:-.5)", [("a", -0.5)]),
        ("(a BREAK b:1.5)", [("a", 1.5), ("BREAK", None), ("b", 1.5)]),
        ("BREAK BREAK", [("BREAK", None), ("BREAK", None)]),
        (  # the example in the docstring
            "a (red:1.5) [small] house",
            [("a ", 1.0), ("red", 1.5), (" ", 1.0), ("small", 1 / 1.1), (" house", 1.0)],
        ),
        ("[a:b:0.5] AND c", [("a:b:0.5", 1 / 1.1), (" AND c", 1.0)]),
    ],
)  # fmt: skip
def test_brackets_weigh_as_elsewhere(prompt, pieces):
    found = parse_weights(prompt)
    assert [piece for piece, _ in found] == [piece for piece, _ in pieces]
    for (_, weight), (_, truth) in zip(found, pieces):
        assert weight == truth or weight == pytest.approx(truth)


def test_a_prompt_without_marks_is_read_as_clip_reads_it(tiny, weighing):
    for prompt in ("", "a red house", "two cats, 3 dogs! " * 4):
        ours, plain = (model.encode_prompts([prompt, ""]) for model in (weighing, tiny))
        assert mx.array_equal(ours, plain)


def test_weights_scale_vectors_and_then_all_are_scaled_to_the_mean_that_was(tiny, weighing):
    """(C z) m / m': written out in float64."""
    plain = np.array(tiny.encode_prompts(["a red house"]), np.float64)
    for prompt, weight in (("a (red:1.5) house", 1.5), ("a [red] house", 1 / 1.1)):
        weights = np.ones((1, 77, 1))
        weights[:, 2] = weight  # behind START and "a"
        truth = plain * weights * plain.mean() / (plain * weights).mean()
        assert_close(weighing.encode_prompts([prompt]), truth, 1e-5)
    # The others change by 3 percent, as the module's docstring says.
    others = np.array(weighing.encode_prompts(["a (red:1.5) house"]))[:, 3:] / plain[:, 3:]
    assert np.allclose(others, 0.971, atol=0.0005)


def test_long_prompts_are_read_in_chunks_of_75(tiny, weighing):
    words = [f"word {i % 10}" for i in range(60)]  # two tokens each
    context = weighing.encode_prompts([" ".join(words), "a tree"])
    assert context.shape == (2, 154, WIDTH)
    text = " ".join(" ".join(words).split())
    ids = [i for _, _, word in tiny.tokenizer.split(text) for i in word]
    assert len(ids) == 120
    rows = [[49406, *ids[:75], 49407], [49406, *ids[75:], *[49407] * 31]]
    truth = tiny.text_encoder(mx.array(rows)).reshape(1, 154, WIDTH)
    assert_close(context[:1], truth, 1e-5)
    empty = tiny.encode_prompts(["a tree", ""])
    assert_close(context[1:], empty.reshape(1, 154, WIDTH), 1e-5)
    broken = weighing.encode_prompts(["a red house BREAK at night"])
    plain = tiny.encode_prompts(["a red house", "at night"])
    assert_close(broken, plain.reshape(1, 154, WIDTH), 1e-5)
    # Without this reader the rest is left out.
    assert tiny.encode_prompts([" ".join(words)]).shape == (1, 77, WIDTH)
    assert len(tiny.txt2img("(a tree) " * 90, steps=1)) == 1


def test_version_2_fills_up_with_its_own_id(tiny, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer, "pad", 0)
    rows = [tiny.tokenizer.encode(text) for text in ("a red house", "at night")]
    truth = tiny.text_encoder(mx.array(rows)).reshape(1, 154, WIDTH)
    assert_close(read_weighted(tiny, ["a red house BREAK at night"]), truth, 1e-5)


def test_long_prompts_paint_as_in_diffusers_with_their_embeddings(weighing, tiny_pipeline):
    prompt = "a red house, " * 30
    context = torch.from_numpy(np.array(weighing.encode_prompts([prompt, ""])))
    tiny_pipeline.scheduler = scheduler(DDIMScheduler)
    truth = tiny_pipeline(
        prompt_embeds=context[:1], negative_prompt_embeds=context[1:], num_inference_steps=5,
        guidance_scale=3, width=128, height=128, generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images  # fmt: skip
    *_, x = weighing.generate_latents(prompt, steps=5, seed=3, cfg=3, sampler="ddim")
    assert np.abs(np.array(weighing.decode(x)) - truth).max() <= 1e-3


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """<trio> stands for three vectors, <crowd> for eighty."""
    rng = np.random.default_rng(0)
    vectors = {"<trio>": rng.standard_normal((3, WIDTH), np.float32) / 4}
    vectors["<crowd>"] = rng.standard_normal((80, WIDTH), np.float32) / 4
    path = tmp_path_factory.mktemp("words") / "words.safetensors"
    write_file(path, {"kind": "words"}, {name: mx.array(v) for name, v in vectors.items()})
    return textual_inversion(path)


def test_a_loaded_word_is_read_with_both_readers_and_may_have_a_weight(words):
    plain = sd.StableDiffusion(changes=[words])
    weighing = sd.StableDiffusion(changes=[words], reader=read_weighted)
    text = "a red <trio> at night"
    assert mx.array_equal(weighing.encode_prompts([text]), plain.encode_prompts([text]))
    context = np.array(plain.encode_prompts([text]), np.float64)
    weights = np.ones((1, 77, 1))
    weights[:, 3:6] = 1.2
    truth = context * weights * context.mean() / (context * weights).mean()
    assert_close(weighing.encode_prompts(["a red (<trio>:1.2) at night"]), truth, 1e-5)


def test_the_vectors_of_a_loaded_word_are_not_parted_between_chunks(words):
    model = sd.StableDiffusion(changes=[words], reader=read_weighted)
    trio = model.tokenizer.words["<trio>"]
    for before, sizes in ((72, [75]), (73, [73, 3]), (74, [74, 3]), (75, [75, 3])):
        chunks = split_chunks(model.tokenizer, "dog " * before + "<trio>")
        assert list(map(len, chunks)) == sizes
        assert [i for i, _ in chunks[-1]][-3:] == trio
    # But a word of more than 75 vectors can't be kept together.
    assert list(map(len, split_chunks(model.tokenizer, "dog <crowd> dog"))) == [75, 7]
    assert model.encode_prompts(["dog <crowd> dog"]).shape == (1, 154, WIDTH)


def test_tokens_are_shown_as_they_are_read(tiny, weighing, capsys):
    def shown(model, prompt):
        show_tokens(model, prompt)
        return capsys.readouterr().out.splitlines()

    word, pieces, more, *ids = shown(tiny, "a househunter")[1].split()
    assert (word, pieces, more) == ("househunter", "house", "hunter</w>") and len(ids) == 2
    assert shown(tiny, "a househunter") == shown(weighing, "a househunter")
    assert shown(tiny, "a househunter")[-1] == "3 of 75 tokens"
    prompt = "a (red:1.5) house BREAK [cat] " + "dog " * 80
    lines = [line.split() for line in shown(weighing, prompt)]
    assert lines[1] == ["red", "red</w>", "736", "x", "1.5"] and ["BREAK"] in lines
    assert lines[-1] == ["3", "+", "75", "+", "6", "of", "75", "tokens"]
    plain = shown(tiny, prompt)
    assert plain[1].startswith("(") and plain[-1].startswith("9")
