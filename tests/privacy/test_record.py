"""Privacy level "record": what rounds cost, what a site remembers of them, and what leaves it."""

import functools
import itertools
import math
from statistics import NormalDist

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld
from flwr.app import Context, RecordDict

from ssfl_app import config, installed, runtime
from ssfl_app.comm.payload import ClientState, Payload
from ssfl_app.config import parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.privacy import record
from ssfl_app.privacy.options import PrivacyOptions
from ssfl_app.privacy.record import Sampling, begun, secret_generator, spent
from ssfl_app.results.recorder import round_line
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies import REGISTRY
from ssfl_app.testing.grid import SMALL, Played, answer_error, play

NOISE = {"privacy.level": "record", "privacy.noise-multiplier": 1.0}
BUDGET = {"privacy.level": "record", "privacy.epsilon": 8.0}
FAST = {
    "model.width": 0.25,
    "run.evaluate-every": 9,
    "run.clients": 3,
    "run.cohort": 3,
    "run.rounds": 2,
    "partition.name": "quantity",
}


def of_dp_accounting(noise, rate, steps, delta, grid=1e-4):
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, grid)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps)
    return accountant.get_epsilon(delta)


# ---- accounting ------------------------------------------------------------------------------


def test_steps_of_a_local_round_are_those_of_its_epochs():
    assert Sampling.of(90, 16, 2) == Sampling(90, 16, 12)  # 11.25: never less than the epochs
    assert Sampling.of(5, 16, 3) == Sampling(5, 5, 3)
    assert Sampling.of(5, 16, 3).rate == 1


def test_epsilon_is_that_of_dp_accounting():
    sampling = Sampling(100, 10, 8)
    found = sampling.epsilon(1.5, 5, 1e-4)
    wanted = of_dp_accounting(1.5, 0.1, 40, 1e-4)
    assert wanted <= found * 1.0001
    assert found == pytest.approx(wanted, rel=1e-3)
    coarse = of_dp_accounting(0.25, 0.1, 40, 1e-4, grid=4e-3)  # where there is little noise
    assert sampling.epsilon(0.25, 5, 1e-4) == pytest.approx(coarse, rel=1e-9)


def test_epsilon_without_sampling_is_the_gaussian_mechanisms_and_not_that_of_replacing():
    """Balle and Wang, "Improving the Gaussian mechanism for differential privacy", ICML 2018, theorem 8.

    T releases of noise z are one of mu = sqrt(T) / z. Of a record that is replaced, sensitivity would be twice that.
    """

    def delta_of(eps, mu):
        phi = NormalDist().cdf
        return phi(mu / 2 - eps / mu) - math.exp(eps) * phi(-mu / 2 - eps / mu)

    found = Sampling(10, 10, 4).epsilon(5.0, 6, 1e-5)
    assert delta_of(found, math.sqrt(24) / 5) == pytest.approx(1e-5, rel=0.02)
    assert delta_of(found, 2 * math.sqrt(24) / 5) > 1e-3


def test_epsilon_is_below_the_one_that_was_published_with_the_moments_accountant():
    """Abadi et al., CCS 2016, section 3.2: q = 0.01, sigma = 4, delta = 1e-5, 10,000 steps: 1.26, a looser bound."""
    found = Sampling(10_000, 100, 100).epsilon(4.0, 100, 1e-5)
    assert 0.7 * 1.26 < found < 1.26


def test_noise_for_a_budget_is_the_least_that_keeps_it():
    sampling = Sampling(72, 16, 23)
    found = sampling.noise_for(8.0, 1e-5, 3)
    assert of_dp_accounting(found, sampling.rate, 69, 1e-5) <= 8.0
    assert of_dp_accounting(0.98 * found, sampling.rate, 69, 1e-5) > 8.0


@pytest.mark.timeout(60)
def test_noise_that_hides_nothing_has_a_large_epsilon_and_fits_into_memory():
    assert Sampling(300, 16, 94).epsilon(0.01, 20, 1e-5) > 10_000


def test_a_missing_extra_is_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(installed.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r'dp-accounting is not installed here: pip install "ssfl-app\[privacy\]"'):
        installed.needed("dp_accounting.pld")


# ---- secrets ---------------------------------------------------------------------------------


def test_a_secret_generator_has_the_whole_state_of_the_operating_systems_bytes(monkeypatch):
    """NumPy's Mersenne Twister with these words draws what torch's does; a seed of torch has 32 bits."""
    words = np.random.default_rng(1).integers(0, 2**32, 624, dtype=np.uint32)
    monkeypatch.setattr(record.os, "urandom", lambda count: words.tobytes()[:count])
    drawn = torch.randint(0, 2**32, (1000,), generator=secret_generator(torch.device("cpu")), dtype=torch.int64)
    twin = np.random.MT19937(0)
    twin.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    torch_takes = twin.random_raw(2000).astype(np.uint64)
    whole = (torch_takes[0::2] << np.uint64(32)) | torch_takes[1::2]
    assert drawn.numpy().tolist() in ([int(x) for x in torch_takes[:1000]], [int(x % 2**32) for x in whole])


def test_two_secret_generators_differ_and_draw_normal_numbers():
    one, two = (torch.randn(100_000, generator=secret_generator(torch.device("cpu"))) for _ in range(2))
    assert abs(float((one * two).mean())) < 5 / math.sqrt(100_000)
    assert abs(float(one.mean())) < 5 / math.sqrt(100_000)
    assert abs(float(one.std()) - 1) < 5 / math.sqrt(200_000)


# ---- the ledger ------------------------------------------------------------------------------

SAMPLING = Sampling(72, 16, 23)


def test_a_budget_pays_for_each_round_once():
    options = PrivacyOptions(level="record", epsilon=8.0)
    ledger = {}
    for done in range(1, 4):
        ledger = begun(ledger, options, SAMPLING, 3)
        assert ledger["begun"] == done
        assert spent(ledger) <= 8.0
    assert spent(ledger) == pytest.approx(8.0, rel=0.01)
    rule = r"privacy\.epsilon is 8; it pays for 3 rounds of this client, which has begun 3 and answers no more"
    with pytest.raises(PayloadError, match=rule):
        begun(ledger, options, SAMPLING, 3)


def test_a_given_noise_ends_nothing_and_epsilon_grows():
    options = PrivacyOptions(level="record", noise_multiplier=2.0)
    ledgers = list(itertools.accumulate(range(4), lambda ledger, _: begun(ledger, options, SAMPLING, 2), initial={}))[
        1:
    ]
    costs = [spent(ledger) for ledger in ledgers]
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx(of_dp_accounting(2.0, 16 / 72, 23, 1e-5), rel=1e-3)


@pytest.mark.parametrize(
    ("sampling", "options"),
    [(Sampling(73, 16, 23), {}), (SAMPLING, {"noise_multiplier": 0.5}), (SAMPLING, {"delta": 0.1})],
)
def test_other_data_or_options_than_before_are_refused(sampling, options):
    ledger = begun({}, PrivacyOptions(level="record", noise_multiplier=2.0), SAMPLING, 3)
    changed = PrivacyOptions(**{"level": "record", "noise_multiplier": 2.0} | options)
    with pytest.raises(PayloadError, match="this client began its private rounds with"):
        begun(ledger, changed, sampling, 3)


@pytest.fixture(params=["flower", "folder"])
def state(request, tmp_path):
    """Return what makes the state of client 3 anew, as each message does."""
    context = Context(0, 0, {}, RecordDict(), {})
    return functools.partial(ClientState, context, 3, tmp_path if request.param == "folder" else None)


def test_a_client_remembers_its_ledger_whatever_the_server_says_of_rounds(state):
    assert state().ledger() == {}
    state().change_ledger(lambda held: held | {"begun": 2, "noise": 1.5})
    state().load(0)  # "none of your answers was taken"
    assert state().ledger() == {"begun": 2, "noise": 1.5}


def test_a_damaged_ledger_ends_the_answers(tmp_path):
    make = functools.partial(ClientState, Context(0, 0, {}, RecordDict(), {}), 3, tmp_path)
    make().change_ledger(lambda held: {"begun": 2, "noise": 1.5})
    (file,) = (tmp_path / "client-00003").glob("[!.]*")
    file.write_bytes(file.read_bytes().replace(b"2", b"1"))
    with pytest.raises(PayloadError, match="ledger of this client's privacy budget is damaged"):
        make().ledger()


# ---- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"privacy.epsilon": 8.0}, r"privacy\.epsilon is 8; privacy\.level is 'none', which adds no noise"),
        ({"privacy.level": "record"}, "neither privacy.epsilon nor privacy.noise-multiplier is given"),
        (
            NOISE | BUDGET,
            r"privacy\.epsilon is 8 and privacy\.noise-multiplier is 1; with privacy\.level 'record' one",
        ),
    ],
)
def test_a_level_has_a_budget_or_a_noise(keys, fault):
    with pytest.raises(ConfigError, match=fault):
        parse(keys)


@pytest.mark.parametrize("strategy", sorted(REGISTRY))
def test_strategies_that_send_more_than_a_private_model_are_refused_by_name(strategy):
    flat = config.merge(SMALL, NOISE, {"strategy": strategy})
    layout = runtime.get_runtime(config.merge(SMALL)).layout
    make = functools.partial(REGISTRY[strategy], ServerContext(layout, parse(flat).settings))
    if strategy in ("fedavg", "random", "fedprox"):
        make()
        return
    with pytest.raises(ConfigError, match=rf"a client of strategy {strategy} .*: strategy is 'random', or 'fedavg'"):
        make()


def test_a_client_of_ones_own_says_itself_that_it_is_private():
    inherits = type("Own", (REGISTRY["fedavg"].client,), {})
    says = type("Own", (REGISTRY["fedavg"].client,), {"record_level": True})
    settings = parse(config.merge(SMALL, NOISE, {"strategy": "fedavg"})).settings
    says.check_privacy(settings)
    with pytest.raises(ConfigError, match="Own trains in a way of its own"):
        inherits.check_privacy(settings)


def test_batch_norm_is_refused_before_a_run():
    with pytest.raises(ConfigError, match=r"model\.norm is 'batch'; it is 'group' or 'none' with privacy\.level"):
        runtime.check(parse(config.merge(SMALL, NOISE, {"strategy": "fedavg", "model.norm": "batch"})))


# ---- runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds():
    """Give the secret generators seeds, so that the tests repeat."""
    with pytest.MonkeyPatch.context() as patch:
        numbers = itertools.count()
        patch.setattr(record, "secret_generator", lambda device: torch.Generator(device).manual_seed(next(numbers)))
        yield


@pytest.fixture(scope="module")
def budgeted(seeds) -> Played:
    return play({"strategy": "fedavg"} | FAST | BUDGET)


def test_nothing_but_model_samples_and_epsilon_goes_up(budgeted):
    trained = [payload for (kind, _, _), payload in budgeted.grid.got if kind == "train"]
    assert len(trained) == 6
    for payload in trained:
        assert set(payload.metadata) == {"samples", "epsilon", "digest", "passes", "looks", "round"}
        sampling = Sampling.of(payload.metadata["samples"], 32, 1)
        assert payload.metadata["passes"] == sampling.steps * sampling.batch
    assert {kind for kind, _, _ in budgeted.grid.log} == {"query.hello", "train"}  # and no client is tested


def test_each_site_spends_its_budget_by_its_own_data(budgeted):
    first, last = budgeted.records[1:]
    assert 0 < first["epsilon"] < last["epsilon"] <= 8.0
    assert sorted(budgeted.strategy.epsilons) == [0, 1, 2]
    noises = {}
    for client in range(3):
        ledger = ClientState(budgeted.grid.context_of(client), client).ledger()
        sampling = Sampling.of(len(budgeted.runtime.partition.train[client]), 32, 1)
        noises[client] = ledger["noise"]
        total = of_dp_accounting(ledger["noise"], sampling.rate, 2 * sampling.steps, 1e-5, grid=1e-3)
        assert total <= 8.0
        assert total == pytest.approx(budgeted.strategy.epsilons[client], rel=1e-3)
    assert len(set(noises.values())) > 1


def test_records_have_no_loss_of_clients_and_the_line_of_a_round_says_epsilon(budgeted):
    last = budgeted.records[-1]
    assert last["train_loss"] is None
    assert last["local_accuracy_mean"] is None
    assert 0 <= last["central_accuracy"] <= 1
    line = round_line(last, 2, 0.0)
    assert "loss" not in line
    assert f"epsilon {last['epsilon']:.3f}" in line


def test_a_client_that_is_asked_all_the_same_tells_no_accuracy(budgeted):
    memory = ClientState(budgeted.grid.context_of(0), 0)
    with pytest.raises(PayloadError, match="a client tells no accuracy"):
        budgeted.runtime.rule(0, memory, 1).tested(Payload(metadata={"digest": "0"}))


def test_a_run_that_goes_on_knows_what_was_spent(budgeted):
    old = budgeted.strategy
    again = type(old)(ServerContext(budgeted.layout, old.settings))
    again.load_state_dict(2, old.state_dict())
    assert again.epsilons == old.epsilons


def test_a_site_over_its_budget_answers_no_more_and_the_round_says_so(seeds, tmp_path):
    """Round 1 is played again after an interruption: what was begun then is spent, though nobody got it."""
    keys = {"strategy": "fedavg"} | FAST | BUDGET | {"failures.min-ok-fraction": 0.1}
    play(keys, folder=tmp_path, until=1, faults={("train", 1, 1): answer_error(5)})
    again = play(keys, folder=tmp_path)
    assert again.records[1]["refused"] == {}
    refused = again.records[2]["refused"]
    assert sorted(refused) == ["0", "2"]  # 1 never got the message that the interruption made vain
    assert all("it pays for 2 rounds of this client, which has begun 2" in reason for reason in refused.values())


@pytest.mark.parametrize(("strategy", "wanted"), [("fedavg", 0.65), ("random", 0.3)])
def test_learns_under_noise(seeds, strategy, wanted):
    keys = {"mask.density": 0.1, "local.lr": 1.0, "local.epochs": 3, "local.batch-size": 64, "model.width": 0.5}
    played = play({"strategy": strategy} | NOISE | keys)
    assert played.records[-1]["central_accuracy"] > wanted
    if strategy == "random":
        flat = played.layout.flatten_prunable(played.strategy.model())
        assert (flat[~played.strategy.mask.alive] == 0).all()
        assert played.records[-1]["density"] == pytest.approx(0.1, abs=1e-3)


def test_two_runs_of_one_seed_have_other_noise():
    one, two = (play({"strategy": "fedavg"} | FAST | NOISE | {"run.rounds": 1}) for _ in range(2))
    assert one.bits() != two.bits()
    assert one.strategy.cohort(1) == two.strategy.cohort(1)
