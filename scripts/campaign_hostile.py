"""The campaign `hostile`: files that commands read get values that nobody means, and what the commands do is counted.

Every attempt changes one place of one good file: a number becomes huge, negative or odd, a value gets another type, a
text 2 MB, a list 100,000 levels, a key goes or comes twice. The command that reads the file then runs in 8 GB of address
space and may write 100 MB. It has to succeed, or to fail in one line; a signal, a panic, two seconds more of work than for the
good file, 500 MB more of memory and a process that outlives SIGTERM are counted as bad.
"""
import json
import os
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

MEMORY, FILE = 8 << 30, 100 << 20
MORE_SECONDS, MORE_MEMORY, PATIENCE = 2.0, 500 << 20, 20

NUMBERS = [
    "-1", "0", "1", "2", "3", "7", "255", "65536", "1000000", "16777216", "1000000000", "4294967296", "1000000000000",
    "9223372036854775807", "1e-320", "1e-40", "-0.0", "0.5", "0.999999", "1.5", "1e6", "1e18", "1e38", "1e308", "-1e308",
]
PATTERNS = ['"(a|a)*$"', '"(.{1000}){1000}"', '"(?=(a+))\\\\1+b"', '"[^a]{99999}"', '"("', '"\\\\p{Lu}{9999}"']
JSON_ONLY = ["9223372036854775808", "18446744073709551615", "-9223372036854775809", "1e400", "NaN", "null", "{}", '"\\ud800"']
TOML_ONLY = ["inf", "nan", "1979-05-27", "[1, 'a']", "{a = 1}", "'''\n'''"]
OTHERS = ["true", '""', '"a"', '"0"', '"../../etc/passwd"', '"/dev/zero"', "[]", "[0]", "[-1, 1e308]", "[[]]", '["a", "a"]']


def long_values():
    """Returns values whose size alone is the attack."""
    return ['"' + 2_000_000 * "x" + '"', 100_000 * "[" + 100_000 * "]", "[" + 200_000 * "1," + "1]"]


class Json:
    """A JSON document, or lines of them, whose places can be changed."""

    def __init__(self, text):
        self.lines = [json.loads(line) for line in text.splitlines()] if "\n{" in text else None
        self.value = self.lines if self.lines is not None else json.loads(text)

    def changed(self, random):
        mark = "@@HERE@@"
        copy = json.loads(json.dumps(self.value))
        holders = []

        def walk(value):
            keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
            for key in keys:
                holders.append((value, key))
                # Long lists are alike.
                if isinstance(key, str) or key < 4:
                    walk(value[key])

        walk(copy)
        if not holders:
            return "[]"
        holder, key = random.choice(holders)
        old = holder[key]
        what = random.random()
        extra = None
        if what < 0.08:
            del holder[key]
        elif what < 0.14 and isinstance(holder, dict):
            holder[mark] = None
            extra = f"{json.dumps(key)}: {json.dumps(old)}"
        elif what < 0.2 and isinstance(old, list) and old:
            holder[key] = old * random.choice([2, 1000])
        elif what < 0.23:
            holder[key] = mark
            extra = random.choice(long_values())
        else:
            holder[key] = mark
            extra = random.choice(NUMBERS + JSON_ONLY + OTHERS + PATTERNS)
        text = "\n".join(json.dumps(line) for line in copy) + "\n" if self.lines is not None else json.dumps(copy)
        if extra is not None:
            text = text.replace(f'"{mark}": null', extra).replace(f'"{mark}"', extra)
        return text


class Toml:
    """A TOML file of plain lines."""

    KEY = re.compile(r"^(\s*[\w.-]+\s*=\s*)(.*)$")

    def __init__(self, text):
        self.all = text.splitlines()

    def changed(self, random):
        lines = list(self.all)
        places = [i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")]
        i = random.choice(places)
        what = random.random()
        found = self.KEY.match(lines[i])
        if what < 0.08:
            del lines[i]
        elif what < 0.12:
            lines.insert(i, lines[i])
        elif what < 0.15:
            lines.insert(i, ".".join(["a"] * random.choice([10, 100, 100_000])) + " = 1")
        elif what < 0.17:
            lines += ["[[" + ".".join(["a"] * random.choice([10, 100_000])) + "]]"]
        elif found is None:
            lines[i] = random.choice(["[x]", "[[x]]", "= 1", "a", "[train]\n[train]"])
        elif what < 0.2:
            lines[i] = found[1] + random.choice(long_values())
        elif numbers := re.findall(r"(?<![\w.\"'])-?\d[\d_.]*(?:e-?\d+)?", found[2]):
            # One number of the line, so that lists keep their other numbers.
            old = random.choice(numbers)
            new = random.choice(NUMBERS + TOML_ONLY + OTHERS + PATTERNS)
            at = found[2].index(old)
            lines[i] = found[1] + found[2][:at] + new + found[2][at + len(old):]
        else:
            lines[i] = found[1] + random.choice(NUMBERS + TOML_ONLY + OTHERS + PATTERNS)
        return "\n".join(lines) + "\n"


class Case:
    """A file, and the commands that read it. Folders of `copies` are made anew from their originals before each."""

    def __init__(self, file, lines, copies=(), remove=()):
        self.file, self.lines, self.copies, self.remove = file, lines, copies, remove
        self.kind = Toml if file.endswith(".toml") else Json

    def clean(self, bed):
        for name in [*self.remove, *(to for _, to in self.copies)]:
            subprocess.run(["rm", "-rf", str(bed.work / name)], check=True)
        for of, to in self.copies:
            subprocess.run(["cp", "-r", str(bed.work / of), str(bed.work / to)], check=True)


class Words(Case):
    """A command line, of which a number is changed. Work that takes long has to end soon after SIGTERM."""

    NUMBER = re.compile(r"(?<=[ =,:])-?\d[\d.]*(?:e-?\d+)?(?=[ ,:]|$)")

    def __init__(self, line, remove=("made", "made.json", "made.gguf")):
        super().__init__("", [line], remove=remove)

    def changed(self, random):
        (line,) = self.lines
        numbers = list(self.NUMBER.finditer(line))
        for found in random.sample(numbers, min(len(numbers), random.choice([1, 1, 1, 2]))):
            line = line[: found.start()] + random.choice(NUMBERS) + line[found.end():] if found.group() in line else line
        return line


def bounded(file):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))
    os.setpgid(0, 0)


def attempt(bed, line, file=FILE, patience=PATIENCE):
    """Runs a command; returns its status, what it printed, the seconds of its threads, its memory, and whether it was deaf."""
    out, err = bed.work / "stdout", bed.work / "stderr"
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        child = subprocess.Popen(
            [bed.dsmoe, *line.split(), "--quiet"], cwd=bed.work, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL,
            preexec_fn=lambda: bounded(file),
        )
    asked = deaf = None
    began = time.monotonic()
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        now = time.monotonic()
        if asked is None and now - began > patience:
            child.send_signal(signal.SIGTERM)
            asked = now
        elif asked is not None and now - asked > 6:
            deaf = True
            os.killpg(child.pid, signal.SIGKILL)
        time.sleep(0.002)
    child.returncode = os.waitstatus_to_exitcode(status)
    text = err.read_bytes()[:100_000].decode(errors="replace")
    return {
        "code": child.returncode, "stderr": text, "cpu": usage.ru_utime + usage.ru_stime, "bytes": usage.ru_maxrss * 1024,
        "asked": asked is not None, "deaf": bool(deaf),
    }


def fault(seen, calm):
    """Names what is bad about an attempt; none if nothing is."""
    if "panicked" in seen["stderr"]:
        return "panic"
    if seen["deaf"]:
        return "deaf"
    if seen["code"] < 0 and not (seen["asked"] and seen["code"] == -signal.SIGTERM):
        return f"signal {-seen['code']}"
    if seen["code"] == 1 and len(seen["stderr"].strip().splitlines()) != 1:
        return "not one line"
    if seen["code"] == 1 and len(seen["stderr"]) > 4000:
        return "a long line"
    if seen["code"] not in (0, 1, 2, 3, 130, -signal.SIGTERM):
        return f"status {seen['code']}"
    if calm is None:
        return None
    if seen["asked"] or seen["cpu"] > calm["cpu"] + MORE_SECONDS:
        return "slow"
    if seen["bytes"] > calm["bytes"] + MORE_MEMORY:
        return "memory"
    return None


def run(bed, count, only=None):
    """Attacks all cases in turns, `count` times in all. Returns the counts and the number of bad attempts."""
    cases, lines = prepare(bed)
    cases = [case for case in cases if only is None or only in case.file]
    lines = [case for case in lines if only is None or only in "command lines"]
    calm = {}
    for case in cases:
        for line in case.lines:
            case.clean(bed)
            seen = calm[case.file, line] = attempt(bed, line)
            if seen["code"] not in (0, 3):
                raise SystemExit(f"{line}: {seen['stderr']}")
        case.clean(bed)
    found = {"attempts": 0, "files": len(cases), "lines": len(lines), "accepted": 0, "refused": 0, "stopped": 0, "by_file": {}}
    bad = 0
    keep = bed.work / "bad"
    keep.mkdir(exist_ok=True)
    while found["attempts"] < count:
        for case in cases:
            case.clean(bed)
            path = bed.work / case.file
            good = path.read_bytes()
            changed = case.kind(good.decode()).changed(bed.random).encode(errors="surrogatepass")
            for line in case.lines:
                case.clean(bed)
                path.write_bytes(changed)
                seen = attempt(bed, line)
                found["attempts"] += 1
                found["accepted" if seen["code"] == 0 else "refused"] += 1
                kind = fault(seen, calm[case.file, line])
                if kind is None:
                    continue
                bad += 1
                place = found["by_file"].setdefault(case.file, {})
                place[kind] = place.get(kind, 0) + 1
                name = f"{bad:05}-{case.file.replace('/', '+')}"
                (keep / name).write_bytes(changed)
                print(f"{kind}: {line}: {name}: {seen['cpu']:.1f} s, {seen['bytes'] >> 20} MiB: "
                      f"{seen['stderr'][:300]!r}", flush=True)
            case.clean(bed)
            path.write_bytes(good)
        for case in lines:
            case.clean(bed)
            line = case.changed(bed.random)
            seen = attempt(bed, line, file=20 << 30, patience=4)
            found["attempts"] += 1
            found["accepted" if seen["code"] == 0 else "refused"] += 1
            found["stopped"] += seen["asked"]
            kind = fault(seen, None)
            case.clean(bed)
            if kind:
                bad += 1
                place = found["by_file"].setdefault(" ".join(line.split()[:2]), {})
                place[kind] = place.get(kind, 0) + 1
                print(f"{kind}: {line}: {seen['cpu']:.1f} s, {seen['bytes'] >> 20} MiB: {seen['stderr'][:300]!r}", flush=True)
    return found, bad


TASK = """name = "capitals"
about = "capitals of the world"
files = ["capitals.jsonl"]
shot_files = ["capitals.jsonl"]
shots = 2
output = "multiple_choice"
description = "Capitals.\\n"
prompt = "The capital of {{country | upper}} is"
choices = ["{{capital}}", "{{others[0]}}"]
gold = { always = 0 }
delimiter = "\\n"
metrics = ["acc", "acc_norm"]
[columns]
country = { column = ["country", "land.name"], matches = "^[a-z ]+$", otherwise = "is no name" }
"""
GENERATED = """name = "sums"
about = "sums"
files = ["capitals.jsonl"]
output = "generate_until"
prompt = "{{country}} ="
target = "{{capital}}"
answers = ["{{capital}}"]
until = ["\\n", "the"]
metrics = ["exact_match"]
[[filter]]
name = "strict"
regex = "([a-z]+)"
[exact]
ignore_case = true
remove = ["[0-9]+", "articles"]
"""
MIXTURE = """[[source]]
name = "web"
data = ["text.txt"]
weight = 0.5
doc_separator = "."
document_chars = 20000
part = "train"
part_seed = 3
[[source]]
name = "other"
data = "text.txt"
weight = 2
doc_separator = "."
"""
RUN = """steps = 9
batch = 2
seq = 32
accumulate = 2
lanes = 2
lr = 1e-3
min_lr_ratio = 0.1
warmup_steps = 2
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1
clip = 1.0
active_target = 0.5
hold = "threshold"
separability = 0.1
gate_entropy = 0.01
router_lr_scale = 1.0
train_layers = [0, 1]
train_parts = ["ffn", "routers"]
seed = 3
save_every = 3
keep = 2
log_every = 2
eval_every = 3
valid_fraction = 0.1
valid_samples = 50
threads = 2
"""
CONTINUAL = """[train]
batch = 2
seq = 32
accumulate = 2
lr = 1e-3
valid_fraction = 0.1
valid_samples = 20
save_every = 1
[method]
prune = "scores"
density = 0.5
every = 2
rho = 0.05
select = 0.5
random = 0.1
select_every = 3
replay = 6
replay_share = 0.25
ewc = 0.5
[[task]]
name = "first"
data = "text.txt"
steps = 2
[[task]]
name = "second"
data = ["text.txt"]
steps = 1
"""


def prepare(bed):
    """Makes the good files and returns the cases."""
    write = lambda name, text: (bed.work / name).write_text(text)  # noqa: E731
    read = lambda name: json.loads((bed.work / name).read_text())  # noqa: E731
    copy = lambda of, to: subprocess.run(["cp", "-r", str(bed.work / of), str(bed.work / to)], check=True)  # noqa: E731
    calib = "--calib text.txt --samples 8 --seq 32"
    short = "--steps 4 --batch 2 --seq 16 --lr 1e-3"
    bed.must(f"convert dense {calib} --active-target 0.5 --out fitted")
    bed.must("convert dense --as mixtral --experts 4 --top-k 2 --out mixture")
    bed.must(f"prune dense --method llama-moe --budget 0.85 --set experts=8 {calib} --out top-k")
    bed.must(f"prune dense --method thresholds --budget 0.85 {calib} --out skipping")
    bed.must("prune dense --method magnitude --budget 0.85 --out masked")
    config = read("dense/config.json")
    config["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 64}
    write("scaled.json", json.dumps(config))
    bed.must("init --config scaled.json --tokenizer tokenizer/tokenizer.json --out scaled")
    bed.must("init --config scaled.json --max-shard-size 200kB --out sharded")
    copy("dense", "chat")
    write("chat/chat_template.jinja", "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    write("chat/tokenizer_config.json", json.dumps({"bos_token": "a", "eos_token": {"content": "b"}, "add_bos_token": True}))
    write("chat/generation_config.json", json.dumps({"eos_token_id": [1, 2], "temperature": 0.5}))
    write("messages.json", json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}] * 2))
    neurons = config["intermediate_size"]
    half = [list(range(0, neurons, 2)), list(range(1, neurons, 2))]
    write("partition.json", json.dumps({"layers": [half] * config["num_hidden_layers"]}))
    rows = [{"country": name, "capital": f"the {name}", "others": ["x", "y"], "land": {"name": name}} for name in "abcdef"]
    write("capitals.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n")
    for name, text in [("capitals.toml", TASK), ("sums.toml", GENERATED), ("mixture.toml", MIXTURE), ("run.toml", RUN),
                       ("continual.toml", CONTINUAL)]:
        write(name, text)
    for name in ["quick", "related"]:
        write(f"{name}.toml", bed.run(f"reproduce --print-profile {name}")[1])
    profile = "plan profile fitted --data a=text.txt --prompt 8 --continuation 8 --requests 8 --repeats 1 --out plan"
    bed.must(profile)
    bed.must("plan train plan --heads 2 --epochs 2")
    write("requests.jsonl", 2 * '{"prompt": "the cat sat", "max_tokens": 4, "deadline": 2, "weight": 1.5}\n')
    sweep = ("sweep fitted --data text.txt --limit-tokens 64 --seq 32 --active 0.75,0.5 --prefill 8 --decode 2 --repeats 1 "
             "--out sweep")
    bed.must(sweep)
    bed.must("bench record --suite kernels --only rms_norm --processes 1 --threads 1 --repeats 8 --out record.json")
    copy("record.json", "other.json")
    train = f"train moe --data text.txt {short} --active-target 0.5 --save-every 2 --out run"
    bed.must(train + " --stop-after 2")
    copy("run", "run-kept")
    checkpoint = "checkpoints/step-00000002"
    # Without it the values themselves are checked.
    (bed.work / "run-kept" / checkpoint / "checksums.json").unlink()
    continual = "continual continual.toml --model dense --out learnt"
    bed.must(continual)
    for file in ["results.json"]:
        (bed.work / "learnt" / file).unlink()
    subprocess.run(["rm", "-rf", str(bed.work / "learnt/tasks/02-second")], check=True)
    copy("learnt", "learnt-kept")
    copy("text.txt", "shelf.txt")
    (bed.work / "shelf").mkdir()
    copy("text.txt", "shelf/text.txt")
    bed.must("data verify shelf --write")
    records = Path(__file__).resolve().parent.parent / "dsmoe-bench/record"
    for name in ["quick", "related"]:
        copy(records / name, f"record-{name}")
        for packed in (bed.work / f"record-{name}").glob("*.tar.gz"):
            subprocess.run(["tar", "-xzf", packed.name], cwd=packed.parent, check=True)
        block = f"<!-- reproduce record-{name} -->\n<!-- /reproduce -->\n"
        write(f"{name}.md", block)
    run = sorted((bed.work / "record-quick/runs").glob("dsmoe*.json"))[0].name
    timing = sorted((bed.work / "record-quick/timings").glob("dsmoe*.json"))[0].name
    merge = ["reproduce merge record-quick --out merged"]
    lines = [Words(line) for line in [
        "init --preset tiny --seed 3 --max-shard-size 1000000 --out made",
        "convert dense --experts 4 --seed 1 --threshold 0.5 --out made",
        f"convert dense {calib} --active-target 0.5 --core 0.5 --ridge 0.1 --budgets 0.25,0.5 --out made",
        "convert dense --as mixtral --experts 4 --top-k 2 --out made",
        "prune dense --method magnitude --budget 0.85 --out made",
        f"prune dense --method llama-moe --budget 0.85 --set experts=8 {calib} --out made",
        f"prune dense --method sparsegpt --budget 0.85 {calib} --out made",
        "train moe --data text.txt --steps 2 --batch 2 --seq 16 --accumulate 1 --lanes 1 --lr 1e-3 --active-target 0.5 --save-every 1 "
        "--keep 1 --eval-every 1 --valid-fraction 0.1 --valid-samples 10 --seed 0 --set clip=1 --set beta1=0.9 --out made",
        "train moe --data text.txt --tokens 1000 --batch 2 --seq 16 --warmup-steps 3 --sparsity 1 --dry-run --out none",
        "eval dense --data text.txt --seq 16 --stride 8 --limit-tokens 64",
        "eval dense --task capitals.toml --limit 2 --max-new-tokens 3",
        "eval dense --tasks world --world-seed 1 --limit 1",
        "eval fitted --data text.txt --seq 16 --limit-tokens 64 --active 0.5",
        "generate dense --prompt the --max-tokens 2 --temperature 1.0 --top-k 5 --top-p 0.9 --seed 3",
        "data tokenizer --data text.txt --vocab 300 --out made",
        "data world --bytes 20000 --vocab 300 --items 3 --seed 1 --out made",
        profile.replace("--out plan", "--out made"),
        "plan train plan --heads 2 --epochs 1 --seed 1",
        "plan eval plan --heads 1 --epochs 1 --scenes 1 --seed 1",
        "plan choose plan --prompt the-cat-sat --max-tokens 4 --deadline 1 --mu 1 --kappa 1 --server 10,10,1",
        sweep.replace("--out sweep", "--batch 1 --out made"),
        "oracle dense --data text.txt --limit-tokens 64 --seq 32 --exact 100 --beam 2 --seed 1 --out made.json",
        "reconstruct moe --teacher dense --calib text.txt --samples 4 --seq 32 --steps 2 --out made",
        "reproduce --seeds 1 --tokens 100000 --budgets 0.375 --dry-run",
        "grow dense --layers 5 --method lesa --epochs 1 --penalty 0.1 --seed 1 --out made",
    ]]
    model = lambda name: [f"inspect {name}", f"generate {name} --prompt the --max-tokens 2"]  # noqa: E731
    cases = [
        *(Case(f"{name}/config.json", model(name)) for name in
          ["fitted", "scaled", "mixture", "top-k", "skipping", "masked"]),
        Case("scaled.json", ["init --config scaled.json --out made"], remove=["made"]),
        Case("sharded/model.safetensors.index.json", ["inspect sharded"]),
        Case("dense/tokenizer.json", ["generate dense --prompt the --max-tokens 2"]),
        Case("chat/tokenizer_config.json", ["generate chat --chat --prompt hi --max-tokens 2"]),
        Case("chat/generation_config.json", ["generate chat --prompt the --max-tokens 2"]),
        Case("messages.json", ["generate chat --chat --messages messages.json --max-tokens 2"]),
        Case("partition.json", ["convert dense --experts 2 --partition partition.json --out parted"], remove=["parted"]),
        Case("dense/checksums.json", ["verify dense"]),
        Case("shelf/dsmoe-manifest.json", ["data verify shelf"]),
        Case("mixture.toml", ["train moe --mixture mixture.toml --steps 1 --batch 1 --seq 16 --dry-run --out none",
                              "eval dense --mixture mixture.toml --seq 16 --limit-tokens 64"]),
        Case("run.toml", ["train fitted --data text.txt --config run.toml --dry-run --out none"]),
        Case("quick.toml", ["reproduce --profile quick.toml --dry-run"]),
        Case("related.toml", ["reproduce --profile related.toml --dry-run"]),
        Case("continual.toml", ["continual continual.toml --model dense --dry-run"]),
        Case("capitals.toml", ["eval dense --task capitals.toml --limit 2"]),
        Case("sums.toml", ["eval dense --task sums.toml --limit 2 --max-new-tokens 3"]),
        Case("capitals.jsonl", ["eval dense --task capitals.toml", "train moe --data capitals.jsonl --text-column capital "
                                "--steps 1 --batch 1 --seq 4 --dry-run --out none"]),
        Case("plan/profile.json", ["plan train plan --heads 2 --epochs 1", "plan eval plan --heads 1 --epochs 1 --scenes 1",
                                   "plan choose plan --prompt the-cat-sat --max-tokens 4 --deadline 1"]),
        Case("plan/heads.json", ["plan choose plan --prompt the-cat-sat --max-tokens 4 --deadline 1"]),
        Case("plan/points/features.json", [profile + " --resume"]),
        Case("plan/points/0.5.json", [profile + " --resume"]),
        Case("plan/plan.json", [profile + " --resume"]),
        Case("requests.jsonl", ["plan choose plan --requests requests.jsonl"]),
        Case("sweep/points/0.5.json", [sweep + " --resume"]),
        Case("sweep/sweep.json", [sweep + " --resume"]),
        Case("record.json", ["bench compare other.json record.json", "bench history record.json other.json --out history.html"]),
        Case("record-quick/results.json", ["reproduce splice quick.md"]),
        Case("record-related/results.json", ["reproduce splice related.md"]),
        Case(f"record-quick/runs/{run}", merge, remove=["merged"]),
        Case(f"record-quick/timings/{timing}", merge, remove=["merged"]),
        Case("record-quick/setup.json", merge, remove=["merged"]),
        Case(f"run/{checkpoint}/state.json", [train + " --resume"], copies=[("run-kept", "run")]),
        Case(f"run/{checkpoint}/config.json", [train + " --resume"], copies=[("run-kept", "run")]),
        Case("run/metrics.jsonl", [train + " --resume"], copies=[("run-kept", "run")]),
        Case("learnt/continual.json", [continual + " --resume"], copies=[("learnt-kept", "learnt")]),
        Case("learnt/start.json", [continual + " --resume"], copies=[("learnt-kept", "learnt")]),
        Case("learnt/tasks/01-first/report.json", [continual + " --resume"], copies=[("learnt-kept", "learnt")]),
    ]
    return cases, lines
