"""lm-evaluation-harness on Senri: the harness's own scores, with every token of a long context read."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from senri.data.samples import Question  # noqa: E402
from senri.evaluation.lm_eval import SenriLM  # noqa: E402
from senri.evaluation.scoring import score  # noqa: E402

CONTEXT = "it was the best of times, it was the worst of times, "  # far longer than the tiny window of 7
CHOICES = ["t", " it was", "the season of Light"]
MEMORIES = [{"memory_readout": "layer"}, {"memory_readout": "head"}]


@pytest.fixture(scope="module")
def characters():
    """A tokenizer of one printable character a token, for the tiny models."""
    signs = ["<pad>", "<bos>", "<eos>", *(chr(c) for c in range(32, 126))]
    backend = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=256
    )


@pytest.fixture
def make_lm(make_senri, characters):
    """``(piece_size, **config)`` -> the adapter on a tiny Senri in float64."""

    def make(piece_size=5, **config):
        return SenriLM(make_senri(**config), characters, piece_size)

    return make


def ask(*args):
    """Requests as the harness hands them over, one for each tuple of arguments."""
    return [SimpleNamespace(args=arguments) for arguments in args]


def direct(model, context, continuation):
    """Log likelihood and greedy flag from one forward of the whole sequence."""
    logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].double()
    scores = logits.log_softmax(-1)[torch.arange(len(continuation)), continuation]
    return scores.sum().item(), logits.argmax(-1).tolist() == continuation


# one forward of the whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MEMORIES, ids=["layer", "head"])
@pytest.mark.parametrize("piece_size", [1, 5, 1000])
@torch.no_grad()
def test_loglikelihood_is_one_forward_of_the_whole_text(make_lm, options, piece_size):
    lm = make_lm(piece_size, **options)
    scores = lm.loglikelihood(ask(*((CONTEXT, choice) for choice in CHOICES)), disable_tqdm=True)
    for choice, answer in zip(CHOICES, scores, strict=True):
        whole = lm.tok_encode(CONTEXT + choice)
        split = len(CONTEXT.rstrip())  # the harness moves the space before a choice into it
        assert answer == (pytest.approx(direct(lm.model, whole[:split], whole[split:])[0], abs=1e-9), False)


@pytest.mark.parametrize("piece_size", [1, 5, 1000])
@torch.no_grad()
def test_rolling_scores_each_token_once_given_all_before_it(make_lm, piece_size):
    lm = make_lm(piece_size)
    text = CONTEXT * 3
    long, nothing, one = lm.loglikelihood_rolling(ask((text,), ("",), ("a",)), disable_tqdm=True)
    assert long == pytest.approx(direct(lm.model, [1], lm.tok_encode(text))[0], abs=1e-9)
    assert nothing == 0
    assert one == pytest.approx(direct(lm.model, [1], lm.tok_encode("a"))[0], abs=1e-9)


@torch.no_grad()
def test_the_greedy_flag_needs_every_token(make_lm):
    lm = make_lm()
    context = lm.tok_encode(CONTEXT)
    best = lm.model.generate(torch.tensor([context]), max_new_tokens=14, do_sample=False, eos_token_id=None)
    best = best[0, len(context) :].tolist()
    wrong = [[*best[:i], (best[i] + 1) % 97, *best[i + 1 :]] for i in (0, 5, 13)]
    flags = [flag for _, flag in lm._loglikelihood_tokens([(None, context, c) for c in [best, *wrong]], True)]
    assert flags == [True, False, False, False]


@torch.no_grad()
def test_generation_is_one_generation_from_the_whole_prompt(make_lm):
    lm = make_lm()
    ids = lm.tok_encode(CONTEXT)
    whole = lm.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=2)
    whole = lm.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)
    assert len(set(whole)) > 5, "a text that could not show a mistake"
    stop = whole[8:10]
    read = []
    lm.model.model.register_forward_hook(lambda _, __, out: read.append(out.past_key_values.tokens_read))
    answers = lm.generate_until(
        ask((CONTEXT, {"max_gen_toks": 20}), (CONTEXT, {"max_gen_toks": 20, "until": [stop, "never"]})), True
    )
    assert answers == [whole, whole[: whole.index(stop)]]
    assert max(read) == [len(ids) + 19], "the last token is made, not read"


@torch.no_grad()
def test_sampling_is_passed_on(make_lm):
    lm = make_lm()

    def answer(seed, **options):
        torch.manual_seed(seed)
        return lm.generate_until(ask((CONTEXT, {"max_gen_toks": 12, **options})), True)[0]

    sampled = {answer(seed, do_sample=True, temperature=2.0) for seed in range(4)}
    assert len(sampled) == 4
    assert answer(0, do_sample=True, temperature=2.0) in sampled
    assert {answer(seed, do_sample=False, temperature=0.0) for seed in range(4)} == {answer(9)}
    assert answer(0, do_sample=True, temperature=1e-6) == answer(0)


# long contexts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MEMORIES, ids=["layer", "head"])
@pytest.mark.parametrize("loud", [True, False], ids=["loud", "silent"])
@torch.no_grad()
def test_the_first_token_of_a_long_context_counts_iff_the_memory_speaks(make_lm, options, loud):
    lm = make_lm(random=loud, num_sink_tokens=0, **options)  # as a sink it would always count
    same, changed = lm.loglikelihood(ask((CONTEXT, "so"), ("X" + CONTEXT[1:], "so")), disable_tqdm=True)
    difference = abs(same[0] - changed[0])
    assert difference > 1e-6 if loud else difference == 0


@torch.no_grad()
def test_a_shared_context_is_read_once_and_only_scored_tokens_get_logits(make_lm):
    lm = make_lm()
    read, scored = [], []
    lm.model.model.register_forward_hook(
        lambda _, __, given, ___: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    lm.model.lm_head.register_forward_hook(lambda _, __, out: scored.append(out.shape[:-1].numel()))
    context, choices = lm.tok_encode(CONTEXT), [lm.tok_encode(c) for c in CHOICES]
    together = lm._loglikelihood_tokens([(None, context, c) for c in choices], True)
    assert sum(read) == len(context) + sum(len(c) - 1 for c in choices)
    assert sum(scored) == 1 + sum(len(c) - 1 for c in choices), "the shared one is scored once"
    assert max(read + scored) == lm.piece_size
    alone = [lm._loglikelihood_tokens([(None, context, c)], True)[0] for c in choices]
    backwards = lm._loglikelihood_tokens([(None, context, c) for c in reversed(choices)], True)
    assert together == alone == backwards[::-1], "one choice left something for the next"


@torch.no_grad()
def test_an_open_session_is_neither_read_nor_changed(make_lm, tokens):
    lm = make_lm()
    requests = ask((CONTEXT, "so")), ask((CONTEXT, {"max_gen_toks": 5}))
    fresh = lm.loglikelihood(requests[0], True), lm.generate_until(requests[1], True)
    lm.model.read(tokens(1, 30))
    before = lm.model.session.state
    assert (lm.loglikelihood(requests[0], True), lm.generate_until(requests[1], True)) == fresh
    assert lm.model.session.state is before


def test_an_empty_context_is_the_prefix_token(make_lm):
    lm = make_lm()
    assert lm.loglikelihood(ask(("", "so")), True)[0][0] == pytest.approx(
        direct(lm.model, [1], lm.tok_encode("so"))[0], abs=1e-9
    )
    assert lm.loglikelihood(ask((" ", "so")), True)[0][0] == pytest.approx(
        direct(lm.model, [1], lm.tok_encode(" so"))[0], abs=1e-9
    )
    bos = lm.generate_until(ask(("<bos>", {"max_gen_toks": 5})), True)
    assert lm.generate_until(ask(("", {"max_gen_toks": 5})), True) == bos


# the harness's registry and refusals --------------------------------------------------------------------------


def test_registered_as_senri(make_senri, characters, tmp_path):
    model = make_senri(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    characters.save_pretrained(tmp_path)
    arguments = f"pretrained={tmp_path},dtype=float32,sliding_window_size=9,piece_size=3"
    options = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    lm = get_model("senri").create_from_arg_string(arguments, options)
    assert type(lm) is SenriLM
    assert (lm.piece_size, lm.model.config.sliding_window_size, lm.model.device.type) == (3, 9, "cpu")
    request = ask((CONTEXT, "so"))
    assert lm.loglikelihood(request, True)[0] == pytest.approx(SenriLM(lm.model, characters).loglikelihood(request)[0])
    with pytest.raises(ValueError, match="one row at a time: leave batch_size at 1, not 4"):
        get_model("senri").create_from_arg_string(arguments, {"batch_size": 4})


def test_refusals(make_senri, characters):
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        SenriLM(make_senri().train(), characters)
    with pytest.raises(ValueError, match="piece_size must be at least 1, not 0"):
        SenriLM(make_senri(), characters, 0)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "senri.evaluation.lm_eval")
    with pytest.raises(ValueError, match=r"^the .* needs lm_eval: pip install 'senri\[lm-eval\]'$"):
        importlib.import_module("senri.evaluation.lm_eval")


# against lm_eval's own model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_pair(real_base, make_real, real_tokenizer):
    """lm_eval's adapter on the base, and ours on the converted model with a window that holds all inputs."""
    return (
        HFLM(pretrained=real_base, tokenizer=real_tokenizer, backend="causal"),
        SenriLM(make_real(sliding_window_size=2048), real_tokenizer, piece_size=100),
    )


@pytest.fixture(scope="module")
def passages(real_text):
    """Twelve real passages of 600 characters."""
    return [real_text[start : start + 600] for start in range(100_000, 700_000, 50_000)]


@pytest.mark.slow
def test_real_loglikelihood_agrees_with_hflm(real_pair, passages):
    continuations = [" And", " the LORD said unto Moses,", " xylophone"]
    requests = ask(*((text, c) for text in passages[:4] for c in continuations), ("", passages[4]))
    theirs, ours = (lm.loglikelihood(requests, disable_tqdm=True) for lm in real_pair)
    # theirs sums in float32: 1e-3 nats off on 150 tokens, where ours is within 1e-5 of float64
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=1e-5, abs=1e-3)
    assert [flag for _, flag in ours] == [flag for _, flag in theirs]


@pytest.mark.slow
def test_real_greedy_generation_agrees_with_hflm(real_pair, passages):
    gen = {"until": ["\n", " unto"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    history = [{"role": "user", "content": "What is the capital of France?"}]
    prompts = [*passages[:3], real_pair[1].apply_chat_template(history)]
    assert prompts[3] == real_pair[0].apply_chat_template(history)
    assert real_pair[0].tok_encode(prompts[3]) == real_pair[1].tok_encode(prompts[3])
    theirs, ours = (lm.generate_until(ask(*((p, gen) for p in prompts)), disable_tqdm=True) for lm in real_pair)
    assert ours == theirs
    assert "Paris" in ours[3]


@pytest.mark.slow
def test_real_perplexity_task_agrees_with_hflm(real_pair, passages, tmp_path):
    from lm_eval.tasks import TaskManager

    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages[:5]))
    (tmp_path / "local_text.yaml").write_text(
        f"task: local_text\ndataset_path: json\ntest_split: test\noutput_type: loglikelihood_rolling\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/texts.jsonl}}, cache_dir: {tmp_path}/cache}}\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n"
    )
    results = [
        lm_eval.simple_evaluate(
            model=lm, tasks=["local_text"], bootstrap_iters=0, task_manager=TaskManager(include_path=str(tmp_path))
        )["results"]["local_text"]
        for lm in real_pair
    ]
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert results[1][f"{metric},none"] == pytest.approx(results[0][f"{metric},none"], rel=1e-3)
    assert 1.2 < results[1]["byte_perplexity,none"] < 4


def our_score(answer, references):
    """How Senri scores a recalled answer."""
    return score(answer, Question(0, (), tuple(references), 16, {}))


def test_our_scoring_rule_is_the_harness_s():
    from lm_eval.tasks.ruler.common_utils import process_results

    for answer in (" 8284194.", "8284194 and KING-Fisher", " 828419 4", "", "\tking-fisher\n"):
        for references in (["8284194"], ["8284194", "king-fisher"], ["King-Fisher", "8284194", "none"]):
            theirs = process_results({"max_length": 1024, "outputs": references}, [answer])["1024"]
            assert our_score(answer, references) == pytest.approx(theirs)


def run_niah(lm, folder, length, limit):
    """Score and answers of RULER's first needle task; its needle is a 7-digit number in repeated sentences."""
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=["niah_single_1"],
        limit=limit,
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 16},
        metadata={"max_seq_lengths": [length], "tokenizer": str(folder)},
    )
    samples = results["samples"]["niah_single_1"]
    answers = [(sample["resps"][0][0], sample["doc"]["outputs"]) for sample in samples]
    theirs = results["results"]["niah_single_1"][f"{length},none"]
    assert theirs == pytest.approx(sum(our_score(*pair) for pair in answers) / limit)
    return theirs, answers


@pytest.mark.slow
def test_real_niah_agrees_with_hflm(real_pair, real_folder, make_real, real_tokenizer):
    pytest.importorskip("nltk")
    pytest.importorskip("wonderwords")
    theirs, ours = (run_niah(lm, real_folder, length=1024, limit=4) for lm in real_pair)
    assert ours == theirs
    short = SenriLM(make_real(sliding_window_size=64), real_tokenizer)
    lost, answers = run_niah(short, real_folder, length=1024, limit=4)
    assert [references for _, references in answers] == [references for _, references in ours[1]]
    assert lost < ours[0], "what has left the window is lost without a trained memory"
