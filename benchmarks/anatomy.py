"""Does `graftwork.sites.anatomy` find the right parts of every model type of transformers?

Builds each type with `AutoModel.from_config(CONFIG_MAPPING[type]())` on the meta device and holds the roles against
rules of its own, which look at class names, attribute names and shapes, and share no code with the anatomy:

  attention   every module that calls itself an attention and owns two or more projections (layers or parameters) has
              q and v (or a packed qkv, or low-rank pairs), and an output projection where one is left that fits
  mlp         every module that calls itself MLP, FeedForward, FFN or Intermediate has its up and its down
  experts     every expert parameter [E, ., .] and every member of a list of experts has its role and orientation
  purity      no norm, embedding, head, pooler or router stands for a projection; no vocabulary output does
  shapes      up and down of a feed-forward fit each other; the width of a sub-layer is what its exit gives
  cross       a module that calls itself cross-attention is marked so, one that calls itself self-attention is not
  towers      every list of like layers has sites in each of its members, and no two blocks share tower and number
  default     there is something to graft on: q and v, or qkv; else linear; else conv
  graft       gw.graft(model, gw.LoRA()) and gw.graft(model, gw.Bottleneck()) work, and removing them restores the model

Not judged: what a name-bearing Sequential of convolutions is (squeeze-and-excite is often called attention), layers in
a head, pooler or router, a single layer called an MLP, and values where an attention has no projection left for them.

A type counts as covered where no rule is broken. Run: python benchmarks/anatomy.py [--write docs/anatomy.md] [TYPE ...]
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import re
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIMIT = 120.0  # seconds per type
ATTENTION = re.compile(r"attention|attn", re.I)
ATTENTION_NAME = re.compile(r"^(self_|cross_|linear_|encoder_)?(attn|attention)$")
MLP = re.compile(r"mlp|feed_?forward|ffn|intermediate", re.I)
MLP_NAME = re.compile(r"^(mlp|ffn|feed_forward)$")
OUTSIDE = re.compile(r"pool|head|classif|predict", re.I)
CROSS = re.compile(r"cross_?att|encoder_attn|encdec|encoder_decoder_att|crossattn", re.I)
SELF = re.compile(r"self_?att(?!n_?layer_norm)", re.I)
WEIGHT_ROLES = {"q", "k", "v", "qkv", "kv", "o", "up", "gate", "gate_up", "down"}


# -- a view of the model that shares nothing with graftwork -------------------------------------
def projection(module: Any) -> tuple[int, int] | None:
    """(out, in) of a linear-like layer or pointwise convolution, else None."""
    from torch import nn

    if isinstance(module, (nn.Linear, nn.Bilinear)):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and set(module.kernel_size) == {1} and module.groups == 1:
        return module.weight.shape[0], module.weight.shape[1]
    if type(module).__name__ == "Conv1D":
        return module.weight.shape[1], module.weight.shape[0]
    return None


def minimal(model: Any, kind: re.Pattern[str], name: re.Pattern[str], least: int) -> list[tuple[str, Any, list[str]]]:
    """(path, module, paths of projections) of the smallest modules of a class or name, with enough projections."""
    named = dict(model.named_modules())
    leaves = [path for path, module in named.items() if projection(module)]
    found = []
    for path, module in named.items():
        named_so = name.search(path.rpartition(".")[2]) and type(module).__name__ != "Sequential"
        if projection(module) or not (kind.search(type(module).__name__) or named_so):
            continue
        inside = [leaf for leaf in leaves if within(leaf, path)]
        if len(inside) >= least and path:
            found.append((path, module, inside))
    larger = {path[:i] for path, _, _ in found for i, letter in enumerate(path) if letter == "."}
    return [item for item in found if item[0] not in larger]


def within(path: str, top: str) -> bool:
    return path == top or path.startswith(top + ".") or not top


class Check:
    """The rules over one model. problems: one line per rule broken."""

    def __init__(self, model: Any, anatomy: Any) -> None:
        self.model, self.sites = model, anatomy.sites
        self.named = dict(model.named_modules())
        self.problems: list[str] = []
        self.roles: dict[str, set[str]] = {}
        for site in self.sites:
            self.roles.setdefault(site.path, set()).add(site.role)

    def run(self) -> list[str]:
        for rule in (
            self.attention,
            self.bare,
            self.mlp,
            self.experts,
            self.purity,
            self.shapes,
            self.cross,
            self.towers,
            self.default,
        ):
            rule()
        return self.problems

    def say(self, rule: str, path: str, text: str) -> None:
        self.problems.append(f"{rule}: {path} ({type(self.named[path]).__name__}): {text}")

    def under(self, top: str) -> set[str]:
        return set().union(*(roles for path, roles in self.roles.items() if within(path, top)), set())

    def exempt(self, path: str) -> bool:
        """In a head, a pooler or a router: so says the anatomy, and so does a name on the way."""
        if not self.under(path) & {"head", "lm_head", "pooler", "router"}:
            return False
        parts = path.split(".")
        ways = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(
            OUTSIDE.search(way.rpartition(".")[2]) or OUTSIDE.search(type(self.named[way]).__name__) for way in ways
        )

    def attention(self) -> None:
        """q and v, or a pack, or pairs; where nothing projects values (shared or raw values), all of it has a role."""
        for path, _, inside in minimal(self.model, ATTENTION, ATTENTION_NAME, 2):
            roles = self.under(path)
            if self.exempt(path) or not roles:
                if not roles:
                    self.say("attention", path, "nothing found")
                continue
            loose = [p for p in inside if not self.roles.get(p, set()) & {"q", "k", "v", "qkv", "kv", "o"}]
            forward = [p for p in loose if self.roles.get(p, set()) & {"up", "down", "gate", "gate_up"}]
            if len(loose) == len(forward) == len(inside):
                continue  # a feed-forward that is named after the attention it follows
            if not ("qkv" in roles or ("q" in roles and (roles & {"v", "kv"} or not loose))):
                self.say(
                    "attention",
                    path,
                    f"no q and v; roles {sorted(roles)}; has {[p[len(path) + 1 :] for p in inside]}",
                )
            elif "o" not in roles:
                self.output(path, loose)

    def bare(self) -> None:
        """An attention that keeps its projections as parameters of its own."""
        for path, module in self.named.items():
            matrices = [
                n
                for n, p in module.named_parameters(recurse=False)
                if p.ndim > 1 and re.match(r"[qkv](_|$)|in_proj", n)
            ]
            if ATTENTION.search(type(module).__name__) and len(matrices) >= 2 and not {"q", "v"} <= self.under(path):
                self.say("attention", path, f"parameters {matrices} have no role")

    def output(self, path: str, loose: list[str]) -> None:
        """No o found: is there a projection left that takes what the values give and returns what the query takes?"""
        sites = [s for s in self.sites if within(s.path, path) and s.role in ("q", "v", "qkv")]
        shapes = {s.role: projection(s.module) for s in sites if projection(s.module)}
        parent = path.rpartition(".")[0]
        near = [
            p
            for p in self.named
            if within(p, parent) and p.count(".") <= path.count(".") + 1 and projection(self.named[p])
        ]
        for p in [
            *loose,
            *(p for p in near if re.search("att|out", p[len(parent) :]) and not self.roles[p] & WEIGHT_ROLES),
        ]:
            out, into = projection(self.named[p])
            value, query = shapes.get("v"), shapes.get("q") or shapes.get("qkv")
            if query and out == query[1] and (value is None or into == value[0]):
                self.say("attention", path, f"no o, but {p} would fit")

    def mlp(self) -> None:
        for path, module, inside in minimal(self.model, MLP, MLP_NAME, 1):
            parent = path.rpartition(".")[0]
            if self.exempt(path):
                continue
            roles = {role.removeprefix("expert.") for role in self.under(path)}
            if len(inside) == 1:
                beside = [p for p in self.named if within(p, parent) and projection(self.named[p])]
                if len(beside) == 1 or self.roles.get(inside[0], set()) & {"q", "k", "v", "qkv", "kv", "o"}:
                    continue  # one layer that is called an MLP: nothing to pair
                roles |= {role.removeprefix("expert.") for role in self.under(parent)}
                if (
                    not self.roles.get(inside[0], set()) & {"up", "gate_up", "gate", "down"}
                    and "intermediate" in type(module).__name__.lower()
                ):
                    roles = set()
            if not (roles & {"up", "gate_up"} and "down" in roles):
                self.say("mlp", path, f"no up and down; has {[p[len(path) + 1 :] for p in inside]}")

    def experts(self) -> None:
        from torch import nn

        for path, module in self.named.items():
            name = type(module).__name__
            if (
                isinstance(module, nn.ModuleList)
                and path.endswith("experts")
                and "shared" not in path.rpartition(".")[2]
            ):
                for index in range(len(module)):
                    got = {r for r in self.under(f"{path}.{index}") if r.startswith("expert.")}
                    if not ({"expert.up", "expert.gate_up"} & got and "expert.down" in got):
                        self.say("experts", f"{path}.{index}", f"has only {sorted(got)}")
            if "expert" not in name.lower():
                continue
            bare = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim == 3 and "bias" not in n}
            sites = {
                s.param: s
                for s in self.sites
                if s.path == path and (s.role in ("q", "o") or s.role.startswith("expert."))
            }
            for missing in bare.keys() - sites.keys():
                self.say("experts", path, f"{missing} {tuple(bare[missing].shape)} has no role")
            dense = {}
            for param, site in sites.items():
                if param in bare:
                    _, a, b = bare[param].shape
                    dense[site.role] = (b, a) if site.transposed else (a, b)
            up = dense.get("expert.up") or dense.get("expert.gate_up")
            down = dense.get("expert.down")
            if up and down and not (up[1] == down[0] and up[0] in (down[1], 2 * down[1])):
                self.say("experts", path, f"orientation: up {up} and down {down} do not fit")

    def purity(self) -> None:
        vocabulary = getattr(getattr(self.model, "config", None), "vocab_size", None)
        for site in self.sites:
            if site.role not in WEIGHT_ROLES and not site.role.startswith("expert."):
                continue
            cls = type(site.module).__name__
            if re.search(r"norm|embedding|router|rotary", cls, re.I):
                self.say("purity", site.path, f"a {cls} stands for {site.role}")
            if re.search(r"(^|\.)(lm_head|classifier|score|qa_outputs|pooler|class_embed|bbox_embed)(\.|$)", site.path):
                self.say("purity", site.path, f"a head or pooler stands for {site.role}")
            size = projection(site.module)
            if size and vocabulary and size[0] == vocabulary and site.layer is None:
                self.say("purity", site.path, f"a vocabulary output stands for {site.role}")

    def shapes(self) -> None:
        """up and down of one feed-forward fit each other; what o gives is what q takes."""
        for site in self.sites:
            if site.role not in ("attn", "mlp") or site.entry is None or site.exit is None or site.entry == site.exit:
                continue
            into, out = projection(self.named[site.entry]), projection(self.named[site.exit])
            if into and out and site.role == "mlp" and not self.residual(site, into, out):
                self.say("shapes", site.path, f"mlp from {site.entry} {into} to {site.exit} {out}")
            if out and site.width != out[0]:
                self.say("shapes", site.path, f"{site.role} says width {site.width}, {site.exit} gives {out[0]}")

    def residual(self, site: Any, into: tuple[int, int], out: tuple[int, int]) -> bool:
        """A chain of layers that ends at the width it began with, or at the width of a norm of its block."""
        if into[1] != out[0]:
            block = max(
                (b.path for b in self.sites if b.role == "block" and within(site.path, b.path)),
                key=len,
                default="-",
            )
            norms = {
                m.weight.shape[0]
                for p, m in self.named.items()
                if within(p, block) and "norm" in type(m).__name__.lower()
            }
            return out[0] in norms
        return (
            into[0] in (out[1], 2 * out[1])
            or len([p for p in self.named if within(p, site.path) and projection(self.named[p])]) > 2
        )

    def cross(self) -> None:
        for site in self.sites:
            if site.role != "attn":
                continue
            names = " ".join([*site.path.split(".")[-2:], type(site.module).__name__])
            if CROSS.search(names) and not SELF.search(names) and not site.cross:
                self.say("cross", site.path, "calls itself cross-attention, marked self")
            if SELF.search(names) and not CROSS.search(names) and site.cross:
                self.say("cross", site.path, "calls itself self-attention, marked cross")

    def towers(self) -> None:
        from torch import nn

        worked = {
            s.path
            for s in self.sites
            if s.role in {"linear", "conv", "head", "lm_head", "pooler"} or s.role.startswith("expert.")
        }
        for path, module in self.named.items():
            if not isinstance(module, nn.ModuleList) or len(module) < 2 or self.exempt(path):
                continue
            classes = {type(m) for m in module}
            heavy = [i for i, m in enumerate(module) if sum(projection(x) is not None for x in m.modules()) >= 2]
            if len(classes) > 1 or len(heavy) < len(module):
                continue
            for index in heavy:
                top = f"{path}.{index}"
                if not any(within(p, top) for p in worked):
                    self.say("towers", top, "no site in this layer")
            looks = [path for p, _, _ in minimal(module[0], ATTENTION, ATTENTION_NAME, 2)]
            if looks and not any(within(s.path, path) and s.role == "attn" for s in self.sites):
                self.say("towers", path, "no attention in these layers")
        blocks = Counter((s.tower, s.layer) for s in self.sites if s.role == "block")
        for (tower, layer), count in blocks.items():
            if count > 1:
                self.say("towers", "", f"{count} blocks are layer {layer} of tower {tower!r}")

    def default(self) -> None:
        have = {site.role for site in self.sites}
        if not (have & {"qkv", "linear", "conv"} or {"q", "v"} <= have):
            self.say("default", "", f"nothing to graft on; roles {sorted(have)}")


# -- running -------------------------------------
def examine(name: str) -> dict[str, Any]:
    """Build one type and check it."""
    import torch
    import transformers
    from transformers import CONFIG_MAPPING, AutoModel

    from graftwork.sites.anatomy import anatomy

    transformers.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(CONFIG_MAPPING[name]())
    except Exception as error:  # a type that does not build is reported, not judged
        text = str(error).strip() or "no message"
        return {"name": name, "built": False, "why": f"{type(error).__name__}: {text.splitlines()[0][:100]}"}
    start = time.perf_counter()
    found = anatomy(model)
    seconds = time.perf_counter() - start
    counts = Counter(site.role for site in found.sites)
    problems = Check(model, found).run() + grafts(model)
    return {
        "name": name,
        "built": True,
        "class": type(model).__name__,
        "seconds": seconds,
        "roles": dict(counts),
        "towers": found.towers,
        "problems": problems,
    }


def grafts(model: Any) -> list[str]:
    """What goes wrong when LoRA and a bottleneck are grafted with no target named, and removed again."""
    import graftwork as gw

    problems = []
    before = [type(m) for m in model.modules()]
    for method in (gw.LoRA(), gw.Bottleneck()):
        try:
            gw.graft(model, method)
            gw.remove(model, "default")
        except Exception as error:
            problems.append(f"graft: {method.name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    if [type(m) for m in model.modules()] != before:
        problems.append("graft: removing the adapters did not restore the model")
    return problems


def serve(pipe: Connection) -> None:
    while True:
        name = pipe.recv()
        try:
            pipe.send(examine(name))
        except Exception as error:
            import traceback

            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"crash: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            pipe.send(
                {
                    "name": name,
                    "built": True,
                    "class": "?",
                    "seconds": 0.0,
                    "roles": {},
                    "towers": [],
                    "problems": [text],
                }
            )


class Worker:
    """A process that examines types one after the other, and is replaced where one takes too long."""

    def __init__(self) -> None:
        self.context = mp.get_context("spawn")
        self.start()

    def start(self) -> None:
        self.pipe, other = self.context.Pipe()
        self.process = self.context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        self.name, self.since = "", 0.0

    def give(self, name: str) -> None:
        self.name, self.since = name, time.monotonic()
        self.pipe.send(name)

    def take(self) -> dict[str, Any] | None:
        if self.name and self.pipe.poll(0.02):
            try:
                result = self.pipe.recv()
                self.name = ""
                return result
            except EOFError:
                return self.replaced("the process ended")
        if self.name and time.monotonic() - self.since > LIMIT:
            return self.replaced(f"no answer within {LIMIT:.0f} s")
        return None

    def replaced(self, why: str) -> dict[str, Any]:
        name = self.name
        self.process.kill()
        self.start()
        return {"name": name, "built": False, "why": why}


def run(names: list[str], workers: int) -> list[dict[str, Any]]:
    pool = [Worker() for _ in range(min(workers, len(names)))]
    waiting, results = list(reversed(names)), []
    while len(results) < len(names):
        for worker in pool:
            if not worker.name and waiting:
                worker.give(waiting.pop())
            result = worker.take()
            if result is not None:
                results.append(result)
                if sys.stderr.isatty():
                    print(f"\r{len(results)}/{len(names)}", end="", file=sys.stderr)
    for worker in pool:
        worker.process.terminate()
    return sorted(results, key=lambda r: r["name"])


def report(results: list[dict[str, Any]], complete: bool) -> str:
    import torch
    import transformers

    built = [r for r in results if r["built"]]
    good = [r for r in built if not r["problems"]]
    lines = ["# Anatomy: what is found in the model types of transformers", ""]
    lines += [
        "Written by `python benchmarks/anatomy.py --write docs/anatomy.md`, which states the rules.",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}.",
        "",
        f"**{len(good)} of {len(built)} types covered: {100 * len(good) / max(len(built), 1):.1f}%.**",
        "",
    ]
    share = Counter(rule.split(":")[0] for r in built for rule in {p.split(":")[0] for p in r["problems"]})
    have = Counter(role for r in built for role in r["roles"])
    convs = [r["name"] for r in built if not r["roles"].get("linear")]
    slow = max(built, key=lambda r: r["seconds"], default=None)
    lines += [f"{len(results) - len(built)} registered types do not build by themselves, see below."]
    lines += [
        f"{len(convs)} types have no linear layer in a repeated block (the sites are convolutions): {', '.join(convs)}."
    ]
    if slow is not None:
        mean = 1000 * sum(r["seconds"] for r in built) / len(built)
        lines += [f"Reading a model takes {mean:.0f} ms on average, {slow['seconds']:.2f} s at most ({slow['name']})."]
    lines += [
        "",
        "| role | types that have it |",
        "| --- | --- |",
        *(f"| {role} | {n} |" for role, n in have.most_common()),
        "",
    ]
    lines += ["## Not covered, and why", ""]
    if share:
        lines += [
            "Types that break a rule: " + ", ".join(f"{rule} {n}" for rule, n in share.most_common()) + ".",
            "",
        ]
    for r in built:
        if r["problems"]:
            lines.append(f"- **{r['name']}** ({r['class']}), {len(r['problems'])} findings, such as")
            kinds: dict[str, str] = {}
            for p in r["problems"]:
                kinds.setdefault(re.sub(r"\d+", "N", p), p)
            lines += [f"    - {p}" for p in list(kinds.values())[:4]]
    if complete:
        lines += ["", "## Types that do not build", ""]
        whys = Counter(re.sub(r"<class '[^']*'?>?.*", "...", r["why"]) for r in results if not r["built"])
        lines += [f"- {n} x {why}" for why, n in whys.most_common()]
        lines += [
            "",
            "## Types",
            "",
            "| type | class | towers | q | v | qkv | up | down | experts | linear | conv |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for r in built:
            n = r["roles"]
            experts = sum(v for k, v in n.items() if k.startswith("expert."))
            cells = [
                n.get("q", 0),
                n.get("v", 0) + n.get("kv", 0),
                n.get("qkv", 0),
                n.get("up", 0) + n.get("gate_up", 0),
                n.get("down", 0),
                experts,
                n.get("linear", 0),
                n.get("conv", 0),
            ]
            towers = ", ".join(r["towers"])
            lines.append(f"| {r['name']} | {r['class']} | {towers} | " + " | ".join(str(c or "") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all where none is given")
    parser.add_argument("--write", type=Path, help="write the report to this file")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    from transformers import CONFIG_MAPPING

    names = given.types or sorted(CONFIG_MAPPING.keys() or CONFIG_MAPPING._mapping)
    results = run(names, given.workers)
    text = report(results, complete=not given.types)
    if given.write:
        given.write.parent.mkdir(parents=True, exist_ok=True)
        given.write.write_text(text)
    print(text.split("\n## Types that do not build")[0])
    built = [r for r in results if r["built"]]
    return 0 if built and sum(not r["problems"] for r in built) >= 0.95 * len(built) else 1


if __name__ == "__main__":
    sys.exit(main())
