"""The Markdown tables of scripts/peers."""

import shlex
import statistics
import sys

# What makes rows of different rounds the same measurement.
KEY = ["peer", "work", "impl", "tokens", "hidden", "intermediate", "experts", "active", "routing", "layers", "dtype",
       "threads"]


class Medians:
    """Rows by what they say, with the medians of their numbers over the rounds."""

    def __init__(self, rows):
        groups = {}
        for row in rows:
            groups.setdefault(tuple(row.get(key) for key in KEY), []).append(row)
        self.rows = [self.median(group) for group in groups.values()]

    @staticmethod
    def median(group):
        row = dict(group[0])
        for name in "seconds", "peak_share", "peak_memory_bytes", "break_even", "active_measured", "others":
            values = [other[name] for other in group if other.get(name) is not None]
            row[name] = statistics.median(values) if values else None
        row["bits"] = sorted({other["bits"] for other in group if other.get("bits")})
        return row

    def all(self, **wanted):
        return [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]

    def one(self, **wanted):
        found = self.all(**wanted)
        return found[0] if found else None


def machine(versions, options):
    command = " ".join(shlex.quote(word) for word in ["scripts/peers", *sys.argv[1:]])
    lines = [f"- {name}: {value}" for name, value in versions.items()]
    lines += [f"- `{command}`: medians of {options.rounds} rounds of {options.repeats} samples, in turns"]
    return "\n".join(lines) + "\n"


def table(work, rows):
    medians = Medians(rows)
    header, body, notes = globals()[f"{work}_table"](medians)
    if not body:
        return f"### {TITLES[work]}\n\nNothing was measured.\n"
    noisy = max((row["others"] for row in medians.rows if row["others"] is not None), default=0)
    notes.append(f"Other programs took {noisy:.2f} of a core at the most (median of a case's rounds).")
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(line) + " |" for line in body]
    return "\n".join([f"### {TITLES[work]}", "", *lines, "", *notes, ""])


TITLES = {
    "matmul": "Matrix products, y = x W^T",
    "ffn": "FFN forward, random routing",
    "edges": "FFN forward, no token, one token, all tokens on one expert",
    "ffn_train": "FFN forward and backward",
    "train": "Whole training steps",
    "decode": "Decoding",
    "threads": "Threads",
}


def ms(row):
    return "-" if row is None else f"{1e3 * row['seconds']:.3g}"


def ratio(above, below):
    """How many times `below` goes into `above`, both seconds or rows."""
    seconds = [None if x is None else x["seconds"] if isinstance(x, dict) else x for x in (above, below)]
    return "-" if None in seconds or not seconds[1] else f"{seconds[0] / seconds[1]:.2f}"


def percent(share):
    return "-" if share is None else f"{100 * share:.3g} %"


def fastest(*rows):
    rows = [row for row in rows if row]
    return min(rows, key=lambda row: row["seconds"]) if rows else None


def shape(row):
    return f"{row['tokens']} x {row['hidden']} x {row['intermediate']}"


def matmul_table(medians):
    header = ["tokens x in x out", "dtype", "threads", "dsmoe ms", "of peak", "packed ms", "PyTorch ms", "gemm ms",
              "faer ms", "fastest other / dsmoe", "our f32 / this"]
    body = []
    for row in medians.all(peer="dsmoe", impl="forward"):
        same = {key: row[key] for key in ("tokens", "hidden", "intermediate", "dtype", "threads")}
        others = [medians.one(peer=peer, impl="forward", **same) for peer in ("torch", "gemm", "faer")]
        f32 = medians.one(peer="dsmoe", impl="forward", **{**same, "dtype": "f32"})
        packed = medians.one(peer="dsmoe", impl="packed", **same)
        body.append([shape(row), row["dtype"], str(row["threads"]), ms(row), percent(row["peak_share"]), ms(packed),
                     *map(ms, others), ratio(fastest(*others), row), ratio(f32, row)])
    return header, body, []


def ffn_table(medians):
    header = ["tokens", "dtype", "experts", "active", "dsmoe ms", "of peak", "our dense ms", "PyTorch dense ms",
              "PyTorch loop ms", "/ (active x fastest dense)", "break-even"]
    body = []
    for row in medians.all(peer="dsmoe", impl="dsmoe"):
        same = {key: row[key] for key in ("tokens", "dtype", "threads")}
        ours = medians.one(peer="dsmoe", impl="dense", **same)
        dense = medians.one(peer="torch", impl="dense", **same)
        loop = medians.one(peer="torch", impl="loop", experts=row["experts"], active=row["active"], **same)
        share = row["active_measured"] * fastest(ours, dense)["seconds"]
        body.append([str(row["tokens"]), row["dtype"], str(row["experts"]), percent(row["active_measured"]), ms(row),
                     percent(row["peak_share"]), ms(ours), ms(dense), ms(loop), ratio(row, share),
                     percent(row["break_even"])])
    return header, body, ["The break-even is the active share above which our dense FFN is faster; 100 %: it never is."]


def edges_table(medians):
    header = ["case", "dtype", "active", "dsmoe ms", "of peak", "our dense ms", "PyTorch dense ms",
              "/ (active x fastest dense)"]
    body = []
    for row in medians.all(peer="dsmoe", impl="dsmoe"):
        same = {key: row[key] for key in ("tokens", "dtype", "threads")}
        ours, dense = (medians.one(peer=peer, impl="dense", **same) for peer in ("dsmoe", "torch"))
        share = row["active_measured"] * fastest(ours, dense)["seconds"]
        case = f"{row['tokens']} tokens" + (" on one expert" if row["routing"] == "one-expert" else "")
        body.append([case, row["dtype"], percent(row["active_measured"]), ms(row), percent(row["peak_share"]), ms(ours),
                     ms(dense), ratio(row, share)])
    return header, body, ["With one token the peak is that of reading the active experts' weights."]


def ffn_train_table(medians):
    header = ["tokens", "dtype", "active", "dsmoe ms", "of peak", "our dense ms", "PyTorch dense ms",
              "PyTorch masked ms", "PyTorch loop ms", "dsmoe / PyTorch dense", "dsmoe / PyTorch masked", "break-even"]
    body = []
    for row in medians.all(peer="dsmoe", impl="dsmoe"):
        same = {key: row[key] for key in ("tokens", "dtype", "threads")}
        ours = medians.one(peer="dsmoe", impl="dense", **same)
        dense, masked, loop = (medians.one(peer="torch", impl=impl, **same) for impl in ("dense", "masked", "loop"))
        # The loop's time is that of the share it was asked for.
        loop = loop if loop and loop["active"] == row["active"] else None
        body.append([str(row["tokens"]), row["dtype"], percent(row["active_measured"]), ms(row),
                     percent(row["peak_share"]), ms(ours), ms(dense), ms(masked), ms(loop), ratio(row, dense),
                     ratio(row, masked), percent(row["break_even"])])
    return header, body, []


def train_table(medians):
    header = ["model", "dtype", "implementation", "tokens/s", "of peak", "PyTorch dense tokens/s",
              "PyTorch masked tokens/s", "/ PyTorch dense", "/ PyTorch masked", "memory", "/ PyTorch dense"]
    body = []
    for row in medians.all(peer="dsmoe"):
        same = {key: row[key] for key in ("hidden", "layers", "dtype", "threads")}
        dense, masked = (medians.one(peer="torch", impl=impl, **same) for impl in ("dense", "masked"))
        tokens = row["tokens"]
        rates = ["-" if peer is None else f"{tokens / peer['seconds']:.0f}" for peer in (row, dense, masked)]
        memory, theirs = row["peak_memory_bytes"], dense and dense["peak_memory_bytes"]
        body.append([f"d {row['hidden']}, L {row['layers']}, V {row['vocab']}", row["dtype"], row["impl"], rates[0],
                     percent(row["peak_share"]), *rates[1:], ratio(dense, row), ratio(masked, row),
                     "-" if memory is None else f"{memory / 1e6:.0f} MB",
                     f"{memory / theirs:.2f}" if memory and theirs else "-"])
    return header, body, ["Memory is what a step needs beyond the program itself, at the most."]


def decode_table(medians):
    header = ["model", "dtype", "active", "tokens/s", "of bandwidth", "/ our dense", "/ transformers"]
    dense, peer = medians.one(peer="dsmoe", impl="dense"), medians.one(peer="torch")
    body = []
    for row in [*medians.all(peer="dsmoe"), *([peer] if peer else [])]:
        body.append([f"{row['peer']} {row['impl']}", row["dtype"], percent(row.get("active_measured")),
                     f"{row['tokens'] / row['seconds']:.2f}", percent(row.get("peak_share")), ratio(dense, row),
                     ratio(peer, row)])
    return header, body, []


def threads_table(medians):
    header = ["work", "dtype", "1 thread ms", "threads", "ms", "speed-up", "same bits"]
    body = []
    for row in medians.all(peer="dsmoe"):
        if row["threads"] == 1:
            continue
        same = {key: row[key] for key in KEY if key != "threads"}
        one = medians.one(**same, threads=1)
        equal = "yes" if one["bits"] == row["bits"] and len(row["bits"]) == 1 else "NO"
        body.append([f"{row['work']} {row['impl']}, {shape(row)}", row["dtype"], ms(one), str(row["threads"]), ms(row),
                     ratio(one, row), equal])
    return header, body, []
