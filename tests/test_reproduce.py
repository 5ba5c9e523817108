"The papers' tables: settings and what differs, budgets, cut and resumed runs, the rehearsal of every table by its command."
import json, math

import numpy as np, pytest, torch

import ssl_notes.reproduce as lib
from ssl_notes.bench import noise_images
from ssl_notes.cli import main
from ssl_notes.reproduce import (TABLES, Deadline, Row, build, deviations, fast_settings, paper_here, paper_settings, reproduce, run_row, schedule_of,
    settings_of, short_settings, updates_in, warm_cosine)

from helpers import Every, differences

ROWS = [r for rows in TABLES.values() for r in rows]
row_names = dict(ids=lambda r: r.name)

# ------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize('row', ROWS, **row_names)
def test_recipes_are_plain_and_their_differences_are_named(row):
    assert deviations(row, paper_settings(row), row.steps) == []
    for recipe in ('paper', 'short', 'fast'):
        s = settings_of(row, recipe, 5000)
        assert json.loads(json.dumps(s)) == json.loads(json.dumps(dict(s)))
        for d in deviations(row, s, 5000):
            k = d.partition(':')[0]
            assert d.startswith(f'{k}: ') and ' -> ' in d
    assert [d for d in deviations(row, settings_of(row, 'short', 5000), 5000) if d.startswith('steps')]
    assert settings_of(row, 'fast', 5000)['mode'] == 'graph'

@pytest.mark.parametrize('row', ROWS, **row_names)
@pytest.mark.parametrize('steps', [100, 3000, 60_000])
def test_lengths_fit_into_the_run(row, steps):
    for make in (short_settings, fast_settings):
        s = make(row, steps)
        assert s.get('rampup', 0) + s.get('rampdown', 0) <= steps and 0 <= s.get('ema', 0) <= .999 and 0 < s.get('bn_momentum', .1) <= .1
    assert short_settings(row, row.steps) == paper_settings(row)

def test_schedules():
    for row in ROWS:
        for recipe in ('paper', 'short', 'fast'):
            s = settings_of(row, recipe, 1000)
            cb = schedule_of(s, 1000 if recipe != 'paper' else row.steps)
            assert cb is None or 0 <= cb.scheds['lr'](.5) <= s['lr'] + 1e-12
    r = warm_cosine(2., .1).scheds['lr']
    assert np.allclose([r(0), r(.05), r(.1), r(1)], [0, 1, 2, 0]) and r(.3) > r(.6)

# --------------------------------------------------------------------------------------------------------- budgets
def test_what_fits_is_the_budget_without_compiling_and_validation(monkeypatch):
    class Fake:
        def no_bar(self):
            from contextlib import nullcontext
            return nullcontext()
        def validate(self): clock[0] += 2.
    clock = [100.]
    def timed(learn, n, w):
        clock[0] += 5. + 2*n*.1                       # five seconds of compiling
        return dict(wall=.1)
    monkeypatch.setattr(lib.time, 'time', lambda: clock[0])
    monkeypatch.setattr(lib, 'time_steps', timed)
    got = updates_in(Fake(), 100., evals=10, probe=20)
    assert math.isclose(got['setup_s'], 5.) and math.isclose(got['valid_s'], 2.) and got['fit'] == int((95 - 5 - 20)/.1)
    assert updates_in(Fake(), 1.)['fit'] == 1

ROW = TABLES['mixmatch'][0]
def small(row=ROW): return lib._small(row)

def run(folder, recipe='short', steps=8, row=ROW, **kw):
    row, data, change = small(row)
    return run_row(row, data, recipe, 1, None, steps, folder, 4, **{**change, **kw})

def test_a_recipe_that_is_the_papers_is_cut_and_the_others_end(tmp_path):
    paper, short = run(tmp_path/'p', 'paper'), run(tmp_path/'s')
    assert (paper['cut'], short['cut']) == (True, False) and paper['done'] == short['done'] == 8
    assert paper['plan']['steps'] == 2**20 and short['plan']['steps'] == 8 and len(paper['curve']) == 4
    assert paper['settings']['rampup'] == 16384 and short['settings']['rampup'] == 1
    assert 'rampup: 16384 -> 1' in short['deviations'] and 'steps: 1048576 -> 8' in paper['deviations']
    assert paper['protocol'] == 'median of the last 2 of 4 evaluations' and paper['evaluated'] == 'EMA teacher'
    assert paper['best'] >= paper['accuracy'] and paper['test_images'] == 100

def test_a_deadline_in_seconds_counts_those_of_earlier_parts(tmp_path):
    row, data, change = small()
    s = {**settings_of(row, 'short', 40), **change}
    learn = build(row, s, data, 40, 4, 1, [Deadline(1e-9)])
    with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-3)
    assert learn.deadline.hit and learn.train_iter == 1
    learn = build(row, s, data, 40, 4, 1, [Deadline(1000.)])
    learn.curve.wall_s = 999.999999
    with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-3)
    assert learn.deadline.hit and learn.train_iter < 40

class Cut(Exception): pass

@pytest.mark.parametrize('recipe', ['paper', 'short'])
def test_a_killed_run_goes_on_with_its_plan(recipe, tmp_path, monkeypatch):
    real = lib.build
    def cut(*a, **kw):
        learn = real(*a, **kw)
        def stop(cb):
            if cb.training and cb.train_iter == 5: raise Cut('here')
        return learn.add_cb(Every('after_batch', stop)) and learn
    monkeypatch.setattr(lib, 'build', cut)
    with pytest.raises(Cut): run(tmp_path/'cut', recipe)
    monkeypatch.setattr(lib, 'build', real)
    with pytest.raises(ValueError, match='holds a run already'): run(tmp_path/'cut', recipe)
    a, b = run(tmp_path/'cut', recipe, resume=True, steps=999), run(tmp_path/'whole', recipe)
    strip = lambda r: {k: v for k,v in r.items() if k not in ('seconds', 'curve')} | dict(
        curve=[{k: v for k,v in o.items() if not k.endswith('_s')} for o in r['curve']])
    assert differences(strip(a), strip(b)) == []

def test_a_finished_run_is_reported_and_not_made_again(tmp_path, monkeypatch):
    first = run(tmp_path)
    monkeypatch.setattr(lib, 'build', lambda *a, **kw: 1/0)
    assert run(tmp_path, resume=True) == json.loads(json.dumps(first))

# --------------------------------------------------------------------------------------------------------- reports
def record(**kw):
    r = dict(name='X', labels=250, error=11.08, spread=.87, source='Y', recipe='fast', accuracy=.9, best=.92, done=1000, seconds=90., cut=False)
    return {**r, **kw}

def test_the_table_has_means_and_spreads_and_says_what_was_cut():
    text = paper_here([record(), record(accuracy=.92, best=.93), record(recipe='paper', cut=True, labels=None, error=None, rehearsal=True, device='CPU')])
    lines = text.splitlines()
    assert len(lines) == 4 and len({l.count('|') for l in lines}) == 1
    assert '| 11.08 ± 0.87 (Y) | fast | 9.00 ± 1.41 | 7.50 ± 0.71 | 2 | 1,000 | 1.5 |' in lines[2]
    assert 'paper, cut off, rehearsal' in lines[3] and '| all | - (Y) |' in lines[3] and lines[3].endswith('| CPU |')

# ---------------------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize('table', TABLES)
def test_every_table_rehearsed_by_its_command(table, tmp_path, capsys):
    args = ['reproduce', table, '--recipe', 'paper,short,fast', '--steps', '8', '--rehearse', '--out', str(tmp_path/'r'), '--result', str(tmp_path/'t.json')]
    assert main(args) == 0
    saved = json.loads((tmp_path/'t.json').read_text())
    assert len(saved['runs']) == 3*len(TABLES[table]) and {'torch', 'cpu', 'commit', 'gpu'} <= set(saved['info'])
    for r in saved['runs']: assert r['rehearsal'] and r['done'] == 8 and np.isfinite([r['accuracy'], r['best']]).all() and r['device'] == 'CPU'
    assert 'result file' in capsys.readouterr().out
    assert main([*args, '--resume']) == 0            # all are finished: reported again
    again = json.loads((tmp_path/'t.json').read_text())
    assert again['runs'] == saved['runs']

def test_rows_and_minutes(tmp_path, capsys):
    assert main(['reproduce', 'bc', '--rows', 'BC+, standard', '--minutes', '.02', '--rehearse', '--recipe', 'short', '--out', str(tmp_path)]) == 0
    saved = json.loads((tmp_path/'reproduce_bc_1_short.json').read_text())['runs']
    assert [r['name'] for r in saved] == ['BC+', 'standard'] and all(r['minutes'] == .02 and r['plan']['fit'] >= 1 for r in saved)

@pytest.mark.parametrize('args, words', [(['nothing'], 'table: got'), (['bc', '--rows', 'BC,X'], "'x' is not in bc"),
                                         (['bc', '--recipe', 'best', '--rehearse', '--steps', '4'], "recipe: got 'best'")])
def test_mistakes_are_one_line(args, words, tmp_path, capsys):
    assert main(['reproduce', *args, '--out', str(tmp_path)]) == 1
    assert words in capsys.readouterr().err
