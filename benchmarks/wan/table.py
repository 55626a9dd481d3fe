"""wan.md, and the tables of docs/wan.md, from wan.json: no number that is not computed here from the record."""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from ssfl_app.comm.exchange import Traffic
from ssfl_app.core.clock import Capacity

STREAM_GOAL, SPEED_GOAL, SPEED_MODEL = 0.05, 8.0, "resnet110"
Case = dict[str, Any]

# Seconds a round, dense and SSFL, in table 4 of SSFL's first version (arXiv 2405.09037v1): five AWS sites.
PAPER = {
    "resnet32": (0.285, 0.238),
    "resnet44": (0.409, 0.328),
    "resnet56": (0.531, 0.407),
    "resnet110": (1.812, 0.781),
}


def gather(case: Case, key: str = "seconds", way: str = "up") -> float:
    """Return how long it takes until the slowest site's transfer is through, mean over rounds: the paper's time."""
    return mean(max(t[key] for t in transfers([r], way)) for r in case["rounds"])


def transfers(rounds: Iterable[dict[str, Any]], way: str, site: int | None = None) -> list[dict[str, Any]]:
    """Return the transfers in one direction, of all sites or one."""
    return [t for r in rounds for t in r["transfers"] if t["direction"] == way and site in (None, t["site"])]


def excess(case: Case, key: str, whole_round: bool = False) -> float:
    """Return by which share the bytes of transfers, or of whole rounds with polling, are more than the payload."""
    every = [t for way in ("up", "down") for t in transfers(case["rounds"], way)]
    payload = sum(t["payload"] for t in every)
    if whole_round:
        carried = sum(s[w][key] for r in case["rounds"][:-1] for s in r["bytes"].values() for w in ("up", "down"))
        payload = sum(t["payload"] for r in case["rounds"][:-1] for t in r["transfers"])
    else:
        carried = sum(t[f"{key}_bytes"] for t in every)
    return carried / payload - 1


def ideal(case: Case, rate_mbit: float) -> float:
    """Return the seconds that the payload alone takes at the rate of a site's link."""
    return 8 * transfers(case["rounds"], "up")[0]["payload"] / (1e6 * rate_mbit)


def round_seconds(case: Case) -> float | None:
    """Return the mean length of the rounds that ended without an evaluation; None if there is none."""
    timed = [r["seconds"] for r in case["rounds"] if r["seconds"] is not None]
    return mean(timed) if timed else None


def computing(case: Case) -> float:
    """Return the mean of the slowest site's seconds between the model's arrival and the reply's departure."""
    return mean(max(r["computing_seconds"]) for r in case["rounds"])


def ordered(known: dict[str, Any]) -> list[Case]:
    """Return the cases from the smallest model to the largest, dense ones first."""
    return sorted(known["cases"].values(), key=lambda c: (len(c["model"]), c["model"], window(c), -c["density"]))


def window(case: Case) -> int:
    """Return how many packets a new connection may send at once; 0: the kernel's ten."""
    return int(case.get("window", 0))


def title(case: Case) -> str:
    """Return the model, and the window of new connections if it is not the kernel's."""
    return case["model"] + (f", first window {window(case)} packets" if window(case) else "")


def pairs(known: dict[str, Any]) -> list[tuple[Case, Case]]:
    """Return (dense, sparse) cases of the same model and window, for which both were measured."""
    found = ordered(known)
    dense = {title(case): case for case in found if case["strategy"] == "fedavg"}
    return [(dense[title(c)], c) for c in found if c["strategy"] == "ssfl" and title(c) in dense]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _times(known: dict[str, Any]) -> str:
    head = ["model", "density", "payload MB, dense -> SSFL", "fewer bytes", "gather s, dense -> SSFL", "faster"]
    head += [
        "busy s, dense -> SSFL",
        "faster",
        "hand out s, dense -> SSFL",
        "round s, dense -> SSFL",
        "paper: faster",
    ]
    rows = []
    for dense, sparse in pairs(known):
        payloads = [transfers(case["rounds"], "up")[0]["payload"] for case in (dense, sparse)]
        row = [title(dense), f"{sparse['density']:g}", " -> ".join(f"{p / 1e6:.3f}" for p in payloads)]
        row += [f"{payloads[0] / payloads[1]:.2f} x"]
        for key in ("seconds", "busy_seconds"):
            a, b = gather(dense, key), gather(sparse, key)
            row += [f"{a:.2f} -> {b:.2f}", f"{a / b:.2f} x"]
        row += [f"{gather(dense, way='down'):.2f} -> {gather(sparse, way='down'):.2f}"]
        row += [" -> ".join("-" if s is None else f"{s:.1f}" for s in map(round_seconds, (dense, sparse)))]
        paper = PAPER.get(dense["model"])
        rows.append([*row, f"{paper[0] / paper[1]:.2f} x" if paper else "-"])
    return table(head, rows)


def _sites(known: dict[str, Any], dense: Case, sparse: Case) -> str:
    head = ["site", "round trip ms", "dense s", "SSFL s", "faster", "round trips in a dense upload", "in SSFL's"]
    head += ["requests and handshakes, dense", "SSFL", "new connections, dense", "SSFL"]
    rows = []
    for number, (name, link) in enumerate(known["links"]["sites"].items()):
        both = [transfers(case["rounds"], "up", number) for case in (dense, sparse)]
        a, b = (mean(t["seconds"] for t in found) for found in both)
        trip = link["measured_ms"]
        row = [name, f"{trip:.1f}", f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f} x"]
        row += [f"{1000 * s / trip:.1f}" if trip > 1 else "-" for s in (a, b)]
        row += [f"{mean(t[key] for t in found):.1f}" for key in ("exchanges", "connections") for found in both]
        rows.append(row)
    return table(head, rows)


def _overheads(known: dict[str, Any]) -> str:
    head = ["model", "strategy", "density", "payload MB", "alone at the link's rate s", "TCP stream over payload"]
    head += ["IP bytes over payload", "IP bytes of the round with polling, over payload"]
    head += ["arrival of the model to departure of the reply, slowest s", "relay late ms, mean / p99"]
    rows = []
    for case in ordered(known):
        late = case["lateness_ms"]
        polled = f"{100 * excess(case, 'wire', True):.1f} %" if len(case["rounds"]) > 1 else "-"
        row = [title(case), case["strategy"], f"{case['density']:g}"]
        row += [f"{transfers(case['rounds'], 'up')[0]['payload'] / 1e6:.3f}"]
        row += [f"{ideal(case, known['links']['rate_mbit']):.2f}", f"{100 * excess(case, 'stream'):.1f} %"]
        row += [f"{100 * excess(case, 'wire'):.1f} %", polled]
        rows.append([*row, f"{computing(case):.1f}", f"{late['mean']:.2f} / {late['p99']:.2f}"])
    return table(head, rows)


def sites(known: dict[str, Any]) -> list[Capacity]:
    """Return the links of a record as clients of the simulated clock; how fast they compute is not asked here."""
    rate = 1e6 * known["links"]["rate_mbit"]
    return [Capacity(math.inf, rate, rate, site["measured_ms"] / 1000) for site in known["links"]["sites"].values()]


def simulated(known: dict[str, Any], case: Case, way: str = "up") -> float:
    """Return what the simulated clock says of the slowest site's upload, or download (`way` "down")."""
    payload = transfers(case["rounds"], way)[0]["payload"]
    traffic = Traffic(payload, 1, 0, 0) if way == "down" else Traffic(0, 0, payload, 1)
    return max(site.seconds(0, traffic) for site in sites(known))


def _clock(known: dict[str, Any]) -> str:
    head = ["model", "strategy", "density", "gather s, measured -> simulated", "off by"]
    head += ["hand out s, measured -> simulated", "off by"]
    rows = []
    for case in ordered(known):
        row = [title(case), case["strategy"], f"{case['density']:g}"]
        for way in ("up", "down"):
            seen, told = gather(case, way=way), simulated(known, case, way)
            row += [f"{seen:.2f} -> {told:.2f}", f"{100 * (told / seen - 1):+.0f} %"]
        rows.append(row)
    return table(head, rows)


def _goals(known: dict[str, Any]) -> str:
    lines = []
    for case in ordered(known):
        over = excess(case, "stream")
        met = "met" if over <= STREAM_GOAL else "NOT met"
        lines.append(
            f"- TCP bytes within {100 * STREAM_GOAL:.0f} % of the payload, {title(case)} {case['strategy']} "
            f"{case['density']:g}: {100 * over:.1f} %, {met}"
        )
    for dense, sparse in pairs(known):
        if dense["model"] == SPEED_MODEL:
            whole, flowing = (gather(dense, key) / gather(sparse, key) for key in ("seconds", "busy_seconds"))
            wire = gather(dense, "wire_bytes") / gather(sparse, "wire_bytes")
            lines.append(
                f"- SSFL {SPEED_GOAL:g} x faster or more on {title(dense)}: gather {whole:.2f} x, "
                f"{'met' if whole >= SPEED_GOAL else 'NOT met'}; busy time {flowing:.2f} x, "
                f"{'met' if flowing >= SPEED_GOAL else 'NOT met'}; "
                f"IP bytes, that is time at the link's rate, {wire:.2f} x"
            )
            lines.append(_why(known, dense, sparse))
    return "\n".join(lines)


def _why(known: dict[str, Any], dense: Case, sparse: Case) -> str:
    """Return what the goal for the gather would ask of the farthest site, and what an upload from there takes."""
    links = list(known["links"]["sites"].values())
    far = max(range(len(links)), key=lambda i: float(links[i]["measured_ms"]))
    trip, limit = links[far]["measured_ms"] / 1000, gather(dense) / SPEED_GOAL
    found = transfers(sparse["rounds"], "up", far)
    asked, begun, took = (mean(t[key] for t in found) for key in ("exchanges", "connections", "seconds"))
    return (
        f"  - {SPEED_GOAL:g} x is a gather of {limit:.2f} s: {limit / trip:.1f} round trips to the farthest site. "
        f"From there SSFL has {asked:.1f} requests and TLS handshakes on two connections, {begun:.1f} of them "
        f"new, and takes {took:.2f} s or {took / trip:.1f} round trips; its bytes alone are "
        f"{ideal(sparse, known['links']['rate_mbit']):.2f} s"
    )


def _timelines(dense: Case, sparse: Case, sites: list[str]) -> str:
    parts = []
    for case in (dense, sparse):
        line = case["rounds"][-1]["slowest_upload"]
        rows = [
            [f"{i * line['step']:.2f}", f"{sent:g}", f"{got:g}"]
            for i, (sent, got) in enumerate(zip(line["sent_kb"], line["got_kb"], strict=True))
        ]
        begun = ", ".join(f"{t:.2f}" for t in line["connections_at"]) or "none"
        parts.append(
            f"{case['model']}, {case['strategy']}, {sites[line['site']]}; new connections at {begun} s:\n\n"
            + table(["s", "kB sent", "kB got"], rows)
        )
    return "\n\n".join(parts)


def write_table(known: dict[str, Any], path: Path, page: Path | None = None) -> None:
    """Write the tables of a record, and those of them that stand between marks in a page."""
    cases = ordered(known)
    if not cases:
        return
    where, loads = cases[-1]["environment"], [c[k] for c in cases for k in ("load_before", "load_after")]
    links, days = known["links"], sorted({case["date"] for case in cases})
    head = (
        f"{where['cores']} cores of {where['cpu']}, no GPU, {' and '.join(days)}, flwr {where['flwr']}, torch "
        f"{where['torch']}, Linux {links['kernel']}; load of the machine {min(loads):.1f} to {max(loads):.1f}. "
        f"Five sites, {links['rate_mbit']} Mbit/s each way, {links['congestion_control']}, "
        f"tcp_slow_start_after_idle {links['slow_start_after_idle']}; delay: {links['delay']}. "
        f"Means over {' or '.join(map(str, sorted({len(c['rounds']) for c in cases})))} rounds a case."
    )
    times, goals = _times(known), _goals(known)
    shown = {"where": head, "times": times, "goals": goals, "bytes": _overheads(known), "clock": _clock(known)}
    parts = [head, "## Times", times, "## Goals", goals]
    for dense, sparse in pairs(known):
        if title(dense) == SPEED_MODEL:
            shown["sites"] = _sites(known, dense, sparse)
            parts += [f"## Uploads of {SPEED_MODEL} by site", shown["sites"]]
            parts += ["## The slowest upload of the last round", _timelines(dense, sparse, list(links["sites"]))]
    parts += ["## Bytes and fixed costs", shown["bytes"], "## The simulated clock", shown["clock"]]
    path.write_text("\n\n".join(parts) + "\n")
    if page is not None:
        page.write_text(fill(page.read_text(), shown))


def fill(text: str, shown: dict[str, str]) -> str:
    """Put each part between ``<!-- name -->`` and ``<!-- end name -->``, in place of what stands there."""
    for name, part in shown.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if begin in text and end in text:
            text = text[: text.index(begin) + len(begin)] + f"\n\n{part}\n\n" + text[text.index(end) :]
    return text
