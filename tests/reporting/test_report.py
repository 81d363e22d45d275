"""Reports: what the page of a run and of two says, what is missing from it, and bad input."""

import errno
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from clae_fast import report, train
from clae_fast.config.layers import resolve
from clae_fast.reporting.images import look
from clae_fast.reporting.runs import read
from clae_fast.training import checkpoint
from clae_fast.training.run_folder import RunFolder
from clae_fast.training.trainer import Trainer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Page(HTMLParser):
    """The texts and figures of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.urls, self._in = [], [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.plots = None
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self._in = tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "script":
            if self.tags[-1][1].get("id") == "plots":
                self.plots = json.loads(data)
        elif self._in != "style" and data.strip():
            self.texts.append(data.strip())

    def row(self, name):
        """The cells of the first table row of this name."""
        cells = re.search(rf'<th scope="row">{re.escape(name)}</th>(.*?)</tr>', self.source)
        return re.findall("<td>(.*?)</td>", cells[1])

    def names(self, figure):
        """The legend of a figure."""
        return [trace.get("name") for trace in self.plots[figure]["data"]]


def page_of(tmp_path, *folders):
    out = tmp_path / "report.html"
    assert report.main([*map(str, folders), "-o", str(out)]) == 0
    return Page(out)


def fails(capsys, argv, code=2):
    """Runs a command line that must fail with one line on stderr, and returns that line."""
    assert report.main([str(arg) for arg in argv]) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def one(runs):
    """The page that training left."""
    return Page(runs / "pair" / "report.html")


@pytest.fixture(scope="module")
def two(runs, tmp_path_factory):
    """The page of both runs."""
    return page_of(tmp_path_factory.mktemp("report"), runs / "pair", runs / "none")


class TestOneRun:
    def test_training_leaves_it_as_the_command_makes_it(self, one, runs, tmp_path):
        assert page_of(tmp_path, runs / "pair").source == one.source

    def test_loads_nothing(self, one):
        loading = {
            value
            for _, attrs in one.tags
            for name, value in attrs.items()
            if name in ("src", "href", "data-src", "srcset")
        }
        assert loading == {"data:,"}
        assert "@import" not in one.source
        assert one.plots is not None

    def test_has_every_figure(self, one):
        assert set(one.plots) == {
            "losses", "accuracy", "accuracy-time", "throughput",
            "attack-0", "embedding-0", "similarities-0", "neighbors-0",
        }  # fmt: skip
        drawn = [attrs["id"] for _, attrs in one.tags if attrs.get("class") == "plot"]
        exported = [attrs["data-png"] for _, attrs in one.tags if "data-png" in attrs]
        assert sorted(drawn) == sorted(exported) == sorted(one.plots)

    def test_axes_have_names_and_units(self, one):
        axes = {
            name: [plot["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
            for name, plot in one.plots.items()
            if name not in ("attack-0", "neighbors-0")
        }
        assert axes == {
            "losses": ["epoch", "loss"],
            "accuracy": ["epoch", "accuracy, %"],
            "accuracy-time": ["training time, seconds", "accuracy, %"],
            "throughput": ["epoch", "images per second"],
            "embedding-0": ["t-SNE 1", "t-SNE 2"],
            "similarities-0": ["cosine similarity of projections", "images, %"],
        }

    def test_curves(self, one):
        assert one.names("losses") == ["clean", "adversarial"]
        assert one.names("similarities-0") == [
            "positives", "adversarial positives", "hardest negatives",
        ]  # fmt: skip
        assert "By leave-one-out kNN among training images." in one.texts

    def test_tables(self, one, runs):
        results = json.loads((runs / "pair" / "results.json").read_text())
        assert one.row("kNN accuracy") == [f"{results['knn']:.1f} %"]
        assert one.row("alignment") == [f"{results['alignment']:.3f}"]
        units, own, over, rate = one.row("pair")
        assert (units, own, over) == ("6", "9", "1.50")
        assert float(rate.replace(",", "")) > 0
        assert one.row("temperature") == ["0.5"]
        assert one.row("torch")[0].startswith(torch.__version__.partition("+")[0])

    def test_map_has_a_thumbnail_of_each_image(self, one):
        plot = one.plots["embedding-0"]
        seen = sorted(index for trace in plot["data"] for index, _ in trace["customdata"])
        assert seen == list(range(64))
        sprite = plot["layout"]["meta"]["sprite"]
        assert sprite["uri"].startswith("data:image/jpeg;base64,")
        assert (sprite["side"], sprite["columns"], sprite["rows"]) == (8, 8, 8)


class TestTwoRuns:
    def test_curves_are_beside_each_other(self, two):
        assert two.names("losses") == ["pair, clean", "pair, adversarial", "none, clean"]
        assert two.names("accuracy") == two.names("throughput") == ["pair", "none"]
        assert (
            "By kNN on the images held out for validation; leave-one-out kNN among training images."
            in two.texts
        )

    def test_there_is_a_switch(self, two):
        buttons = [attrs["aria-pressed"] for _, attrs in two.tags if "data-run" in attrs]
        parts = ["hidden" in attrs for _, attrs in two.tags if "data-part" in attrs]
        assert (buttons, parts) == (["true", "false"], [False, True])
        assert "embedding-1" in two.plots
        assert "attack-1" not in two.plots

    def test_says_what_differs_and_nothing_else(self, two):
        (table,) = re.findall(r"what differs</th>(.*?)</table>", two.source, re.S)
        assert re.findall('<th scope="row">(.*?)</th>', table) == ["attack", "val_size"]
        assert two.row("attack") == ["pair", "none"]
        assert two.row("none") == ["6", "6", "1.00", two.row("none")[-1]]


def copied(runs, tmp_path, name="run"):
    return shutil.copytree(runs / "pair", tmp_path / name)


def edited(path, **values):
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | values))


def test_names_are_escaped(runs, tmp_path):
    first = copied(runs, tmp_path, "<!--<script>&<b>")
    page = page_of(tmp_path, first, runs / "none")
    assert "<!--<script>&" not in page.source
    assert "&lt;!--&lt;script&gt;&amp;&lt;b&gt;" in page.source
    # plotly reads HTML, too
    assert page.names("losses")[0] == "&lt;!--&lt;script&gt;&amp;&lt;b&gt;, clean"
    assert [tag for tag, _ in page.tags].count("script") == 3


def test_equal_names_are_told_apart(runs, tmp_path):
    folders = [copied(runs, tmp_path / name) for name in ("one", "two")]
    page = page_of(tmp_path, *folders)
    assert page.names("accuracy") == ["one/run", "two/run"]
    assert "The runs have the same settings." in page.texts


def test_nested_results_are_rows(runs, tmp_path):
    run = copied(runs, tmp_path)
    more = {"robust": {"pgd20 8/255": 31.25}, "transfer": {"digits": {"alignment": 0.5}}}
    edited(run / "results.json", **more)
    page = page_of(tmp_path, run)
    assert page.row("robust pgd20 8/255 accuracy") == ["31.2 %"]
    assert page.row("transfer digits alignment") == ["0.500"]


@pytest.mark.parametrize(
    ("settings", "attacked"),
    [
        ({"method": "simclr", "attack": "self"}, 8),
        ({"method": "simclr", "adv_fraction": 0.5, "attack_start": "random"}, 4),
        # both views of an image
        ({"method": "acl"}, 16),
        ({"method": "moco", "options": {"queue_size": 16}}, 8),
    ],
)
def test_attacks_of_methods(tmp_path, settings, attacked):
    tiny = {"device": "cpu", "limit": 16, "image_size": 8, "batch_size": 8, "epochs": 1}
    folder = RunFolder.create(tmp_path / "run", resolve(tiny | settings))
    Trainer(folder.config).fit(folder)
    state = torch.get_rng_state()
    (run,) = read([folder.path])
    first, second = (look(run).twins for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first.similarity) == attacked
    # views and adversarial views belong together, in bytes
    assert first.largest == pytest.approx(0.06, abs=1e-6)
    distance = np.abs(first.adversarial.astype(int) - first.views)
    assert 0 < distance.max() <= round(0.06 * 255) + 1
    assert np.array_equal(first.adversarial, second.adversarial)


class TestMissing:
    def test_checkpoint(self, runs, tmp_path):
        run = copied(runs, tmp_path)
        shutil.rmtree(run / "checkpoints")
        page = page_of(tmp_path, run)
        assert "No pictures: last.pt is not there any more." in page.texts
        assert set(page.plots) == {"losses", "accuracy", "accuracy-time", "throughput"}
        assert page.row("run") == ["6", "9", "1.50", page.row("run")[-1]]

    def test_data_set(self, runs, tmp_path):
        run = copied(runs, tmp_path)
        edited(run / "config.json", dataset="cifar10", data_dir=str(tmp_path / "gone"))
        page = page_of(tmp_path, run)
        assert any(text.startswith("No pictures: ") and "gone" in text for text in page.texts)

    def test_attack(self, runs, tmp_path, monkeypatch):
        def build_method(*_):
            raise ValueError("teacher: it is gone")

        monkeypatch.setattr("clae_fast.reporting.images.build_method", build_method)
        page = page_of(tmp_path, runs / "pair")
        assert "No adversarial views: teacher: it is gone." in page.texts
        assert "attack-0" not in page.plots
        assert "embedding-0" in page.plots

    def test_map_of_a_collapsed_encoder(self, runs, tmp_path):
        run = copied(runs, tmp_path)
        path = run / "checkpoints" / "last.pt"
        state = checkpoint.load(path)
        for name, weight in state["method"].items():
            if name.startswith("encoder.") and weight.ndim:
                weight.zero_()
        checkpoint.save(path, state)
        page = page_of(tmp_path, run)
        assert "embedding-0" not in page.plots
        assert any(text.startswith("No map of the embedding: ") for text in page.texts)

    def test_everything_but_the_settings(self, runs, tmp_path):
        run = tmp_path / "run"
        run.mkdir()
        shutil.copy(runs / "pair" / "config.json", run)
        page = page_of(tmp_path, run)
        assert page.plots == {}
        assert page.row("temperature") == ["0.5"]


class TestBadInput:
    def test_no_run(self, tmp_path, capsys):
        assert fails(capsys, [tmp_path / "x"]).startswith(f"error: {tmp_path / 'x'} is no run")
        assert "RUN" in fails(capsys, [])

    def test_a_run_given_twice(self, runs, capsys):
        run = runs / "pair"
        assert fails(capsys, [run, f"{run}/"]) == f"error: {run} is given twice"

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("metrics.jsonl", '{"step": 1, "epoch": 1}\nx\n', "metrics.jsonl, line 2: "),
            ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl, line 1: no log point"),
            ("results.json", "[]", "results.json: not a JSON object"),
            ("versions.json", "{", "versions.json: "),
            ("checkpoints/last.pt", "x", "cannot read checkpoint"),
        ],
    )
    def test_damaged_files(self, runs, tmp_path, capsys, name, content, says):
        run = copied(runs, tmp_path)
        (run / name).write_text(content)
        assert says in fails(capsys, [run, "-o", tmp_path / "report.html"])
        assert not (tmp_path / "report.html").exists()

    def test_a_line_that_is_still_being_written(self, runs, tmp_path):
        run = copied(runs, tmp_path)
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 1')
        assert "losses" in page_of(tmp_path, run).plots

    def test_a_folder_that_is_not_there(self, runs, tmp_path, capsys):
        line = fails(capsys, [runs / "pair", "-o", tmp_path / "x" / "report.html"])
        assert line == f"error: --out must be in a folder that exists, got {tmp_path / 'x'}"

    def test_a_full_disk(self, runs, tmp_path, capsys, monkeypatch):
        def fsync(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        out = tmp_path / "report.html"
        out.write_text("before")
        monkeypatch.setattr(os, "fsync", fsync)
        line = fails(capsys, [runs / "none", "-o", out], code=1)
        assert line == f"error: {out}: No space left on device"
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
        assert out.read_text() == "before"


def test_a_run_does_not_fail_because_of_its_report(tmp_path, monkeypatch, capsys):
    def write(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("clae_fast.reporting.page.write", write)
    run = tmp_path / "run"
    flags = ["--device", "cpu", "--limit", "16", "--image-size", "8", "--batch-size", "8"]
    assert train.main([*flags, "--epochs", "1", "--out", str(run)]) == 0
    warning = capsys.readouterr().err.splitlines()[-1]
    assert warning == f"warning: no {run / 'report.html'}: No space left on device"
    assert (run / "results.json").exists()
