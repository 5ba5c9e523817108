"Every method by its command, cut off and resumed; and what they have in common with one another."
import json

import pytest, torch

from ssl_notes.cli import LABELED, METHODS, PRESETS, main, make_learner, method_settings
from ssl_notes.core import Checkpoint

from helpers import DIGITS, Every, differences, quiet_fit, weights

small = ['--steps', '12', '--evals', '4', '--bs', '8', '--ubs', '8', '--every', '5']
changed = [m for m in METHODS if m != 'supervised']

@pytest.mark.parametrize('method', METHODS)
def test_command(method, tmp_path, capsys):
    args = ['train', method, *small, '--out', str(tmp_path)]
    assert main(args) == 0
    rec = json.loads((tmp_path/'result.json').read_text())
    assert (rec['method'], rec['steps'], rec['ubs'], len(rec['curve'])) == (method, 12, 8, 4)
    assert 'mask_rate' not in rec and ('loss_u' in rec['curve'][-1]) == (method not in LABELED)
    assert method in capsys.readouterr().out

@pytest.mark.parametrize('method', ['supervised', 'bc_learning', 'auxiliary_training'])
def test_no_number_of_labels_is_all_of_them(method, tmp_path, capsys):
    assert main(['train', method, *small, '--labels', '0', '--out', str(tmp_path)]) == 0
    assert json.loads((tmp_path/'result.json').read_text())['labels'] is None
    assert ' all ' in capsys.readouterr().out

def test_the_optimiser_is_a_choice(tmp_path):
    recs = {}
    for opt in ('adam', 'sgd'):
        assert main(['train', 'fixmatch', *small, '--opt', opt, '--out', str(tmp_path/opt)]) == 0
        recs[opt] = json.loads((tmp_path/opt/'result.json').read_text())
    assert (recs['adam']['lr'], recs['sgd']['lr']) == (.002, .03)
    assert recs['adam']['curve'][-1]['loss_x'] != recs['sgd']['curve'][-1]['loss_x']

@pytest.mark.parametrize('method', ['uda', 'fixmatch', 'flexmatch', 'freematch'])
@pytest.mark.parametrize('data, ratio', [('digits', 1), ('cifar10', 7)])
def test_unlabelled_images_of_uda_and_fixmatch(method, data, ratio, tmp_path, monkeypatch):
    import ssl_notes.cli as cli
    seen = []
    monkeypatch.setattr(cli, 'load_data', lambda *a, **kw: DIGITS)
    def stop(*a, **kw): seen.append(kw['ubs']); raise ValueError('enough')
    monkeypatch.setattr(cli, 'run_one', stop)
    assert main(['train', method, '--data', data, '--steps', '2', '--evals', '1', '--bs', '4', '--out', str(tmp_path)]) == 1
    assert seen == [4*ratio]

class Cut(Exception): pass

def stop_at(n):
    def cut(cb):
        if cb.training and cb.train_iter == n: raise Cut('here')
    return Every('after_batch', cut)

def build(method, folder, cbs=(), **change):
    kw = {**method_settings(method, PRESETS['digits'], 12, 4), **change}
    return make_learner(method, DIGITS, labels=40, seed=1, steps=12, evals=4, bs=8,
                        cbs=[Checkpoint(folder, every=1), *cbs], **kw)

def outcome(learn):
    drop = 'cpu_s', 'wall_s', 'cpu', 'wall'
    cbs = {cb.name: cb.state_dict() for cb in learn.cbs if hasattr(type(cb), 'state_dict')}
    return weights(learn), learn.opt.state_dict(), {k: v for k,v in cbs.items() if k != 'curve'}, \
           [{k: v for k,v in r.items() if k not in drop} for r in learn.curve.rows]

@pytest.mark.parametrize('method', changed)
@pytest.mark.parametrize('at', [2, 7])
def test_cut_and_resumed_is_the_same_run(method, at, tmp_path):
    whole = quiet_fit(build(method, tmp_path/'a'), 4, 1e-3)
    with pytest.raises(Cut): quiet_fit(build(method, tmp_path/'b', [stop_at(at)]), 4, 1e-3)
    torch.manual_seed(99)   # another process would be anywhere
    resumed = quiet_fit(build(method, tmp_path/'b'), 4, 1e-3)
    assert not differences(outcome(whole), outcome(resumed))

@pytest.mark.parametrize('method', changed)
def test_same_seed_same_run(method, tmp_path):
    a, b = (quiet_fit(build(method, tmp_path/n), 4, 1e-3) for n in 'ab')
    assert not differences(outcome(a), outcome(b))

@pytest.mark.parametrize('method, off', [('pi_model', dict(w_max=0.)), ('temporal_ensembling', dict(w_max=0.)),
                                         ('pseudo_label', dict(alpha_f=0.)), ('mean_teacher', dict(w_max=0.)),
                                         ('uda', dict(lambda_u=0.)), ('mixmatch', dict(lambda_u=0.)),
                                         ('remixmatch', dict(lambda_u=0., lambda_u1=0., lambda_r=0.)),
                                         ('fixmatch', dict(lambda_u=0.)), ('flexmatch', dict(lambda_u=0.)),
                                         ('freematch', dict(lambda_u=0., lambda_f=0.))])
def test_the_unlabelled_term_moves_the_network(method, off, tmp_path):
    sure = dict(threshold=0.) if method in ('uda', 'pseudo_label', 'fixmatch') else {}   # so early nothing is confident
    few = dict(ubs=650) if method == 'temporal_ensembling' else {}           # each image must come back
    with_it = quiet_fit(build(method, tmp_path/'a', **sure, **few), 4, 1e-3)
    without = quiet_fit(build(method, tmp_path/'b', **sure, **few, **off), 4, 1e-3)
    head = lambda l: l.model.head.weight
    assert not torch.allclose(head(with_it), head(without), atol=1e-4)

def test_narrow_networks_train_in_an_order_of_memory_that_does_not_crash(tmp_path):
    "Going back through a strided 1x1 convolution of fewer than eight channels kills the process, channels last."
    from ssl_notes.bench import noise_images
    from ssl_notes.cli import build_model, memory_order
    for width in (.25, .4375, .5):
        net = build_model(noise_images(), width)
        for _ in range(3): net(torch.rand(8, 3, 32, 32)).sum().backward()
        assert (memory_order(net) == torch.channels_last) == (width == .5)

def test_a_curve_forgets_an_epoch_that_was_broken_off(tmp_path):
    "Ctrl-C in a fit, then a look at the validation set: no row, and no error."
    learn = build('mixmatch', tmp_path, [stop_at(2)])
    with pytest.raises(Cut): quiet_fit(learn, 4, 2e-3)
    with learn.no_bar(): learn.validate()
    assert learn.curve.rows == []
