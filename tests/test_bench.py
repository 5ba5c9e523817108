"Steps per second: counts, ways of running, the clock, the comparison of a device with the CPU."
import json

import pytest, torch
from torch import nn

import ssl_notes.bench as lib
from ssl_notes.bench import (MODES, Bf16, StepClock, augmentations, bench, bench_one, check, check_augmentations, check_methods, noise_images, on_device,
    roofline, rows_of_step, set_mode, some_steps, stages, time_bare, time_steps, work)
from ssl_notes.cli import METHODS, PRESETS, main, make_learner, method_settings
from ssl_notes.core import unwrap
from ssl_notes.models import cifar_resnet18, small_cnn, wide_resnet

from helpers import DIGITS, differences, quiet_fit, weights

def learner(method='mixmatch', steps=40, **kw):
    return make_learner(method, DIGITS, 40, 0, steps, 1, bs=8, **{**method_settings(method, PRESETS['digits'], steps, 1), **kw})

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')

# ---------------------------------------------------------------------------------------------------- on paper
def test_work_is_counted_by_layers():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 7))
    one = work(net, (3, 8, 8))
    assert one == dict(flops=2*(4*4*5*27 + 35), values=3*64 + 5*16 + 5 + 7)
    assert work(net.train(), (3, 8, 8)) == one and net.training and not net[0]._forward_hooks

@pytest.mark.parametrize('make, low, high', [(lambda: wide_resnet(10), .35e9, .5e9), (lambda: cifar_resnet18(10), 1.0e9, 1.2e9)])
def test_known_networks(make, low, high):
    "WRN-28-2 is usually said to have 0.2, a CIFAR ResNet-18 0.56 billion multiplications."
    assert low < work(make(), (3, 32, 32))['flops'] < high

def test_bounds_grow_with_rows_and_shrink_with_speed():
    one = dict(flops=1000, values=10)
    a = roofline(one, 10, 5, 1e6, 1e6, 4)
    assert a['arithmetic'] == 35*1000/1e6 and a['traffic'] == 35*10*4/1e6 and a['step'] == a['arithmetic']
    assert roofline(one, 10, 5, 1e9, 1e6, 4)['step'] == a['traffic']
    assert roofline(one, 20, 5, 1e6)['step'] > roofline(one, 10, 5, 1e6)['step'] > roofline(one, 10, 0, 1e6)['step']

# ------------------------------------------------------------------------------------------------- ways and clock
def test_the_order_of_memory_changes_no_number_and_compiling_none_either():
    runs = {}
    for mode in ('eager', 'channels_last'):
        runs[mode] = weights(quiet_fit(set_mode(learner(steps=4), mode), 1, 1e-3).model)
    assert all(torch.allclose(a.float(), b.float(), atol=5e-3) for a,b in zip(runs['eager'].values(), runs['channels_last'].values()))   # Adam's steps have the size of the rate
    half = weights(quiet_fit(set_mode(learner(steps=4), 'bf16'), 1, 1e-3).model)
    torch._dynamo.reset()
    for mode in ('compiled', 'graph'):
        learn = quiet_fit(set_mode(learner(steps=4), mode, 'eager'), 1, 1e-3)
        assert hasattr(learn.model, '_orig_mod')
        assert differences(weights(unwrap(learn.model)), half) == []

def test_setting_a_mode_twice_compiles_once():
    learn = set_mode(set_mode(learner(), 'compiled', 'eager'), 'eager')
    assert not hasattr(learn.model, '_orig_mod')
    with pytest.raises(ValueError, match="mode: got 'slow'"): set_mode(learn, 'slow')

def test_bf16_is_real_on_the_cpu_and_found_by_the_methods():
    seen = []
    learn = learner('fixmatch', steps=2)
    learn.add_cb(Bf16())
    learn.model[1].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    quiet_fit(learn, 1, 1e-3)
    assert learn.mixed_precision.name == 'mixed_precision' and torch.bfloat16 in seen
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())

def test_the_clock_counts_steps_and_skips_validation():
    learn = learner()
    took = time_steps(learn, 6, 2)
    assert learn.train_iter == 8 and set(took) == {'wall', 'wall_median', 'cpu'} and min(took.values()) > 0
    assert not any(isinstance(cb, StepClock) for cb in learn.cbs)
    with pytest.raises(ValueError, match='shorter than 2 \\+ 40'): time_steps(learner(), 40, 2)

@pytest.mark.parametrize('method, rows', [('supervised', (8, 0)), ('mixup', (8, 0)), ('bc_learning', (8, 0)), ('auxiliary_training', (40, 0)),
    ('pi_model', (24, 0)), ('mixmatch', (24, 16)), ('fixmatch', (24, 0)), ('uda', (16, 8))])
def test_rows_of_a_step(method, rows):
    got = rows_of_step(learner(method))
    if method == 'fixmatch': assert sum(got.values()) == 24       # the weak views may go either way
    elif method != 'uda': assert tuple(got.values()) == rows, got
    else: assert sum(got.values()) == 24

def test_a_teacher_that_is_asked_counts():
    rows = rows_of_step(learner('mean_teacher'))
    assert rows['looked'] > 0

def test_stages_add_up_and_leave_no_callback():
    learn = learner()
    before = len(learn.cbs)
    parts = stages(learn, 5, 2)
    assert list(parts) == lib.STAGES and min(parts.values()) >= 0 and len(learn.cbs) == before

def test_the_bare_network_runs_in_the_same_precision():
    seen = []
    learn = set_mode(learner(), 'bf16')
    learn.model[1].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    time_bare(learn, dict(trained=8, looked=4), 1, 1)
    assert set(seen) == {torch.bfloat16}

def test_command(tmp_path, capsys):
    f, small = tmp_path/'b.json', ['--bs', '4', '--steps', '2', '--warmup', '1']
    assert main(['bench', '--data', 'digits', '--modes', 'eager,compiled', '--backend', 'eager', *small, '--out', str(f)]) == 0
    saved = json.loads(f.read_text())
    assert [r['mode'] for r in saved['runs']] == ['eager', 'compiled'] and saved['runs'][0]['rows'] == dict(trained=12, looked=8)
    assert 'the network alone' in capsys.readouterr().out and saved['info']['torch'] == torch.__version__
    assert main(['bench', '--data', 'random', '--modes', 'channels_last', '--width', '.25', *small, '--out', str(f)]) == 0
    assert main(['bench', '--data', 'random', '--modes', 'fast', '--width', '.25', *small]) == 1

# ------------------------------------------------------------------------------------------------ device and CPU
def test_the_cpu_agrees_with_itself(tmp_path, capsys):
    assert main(['check', '--device', 'cpu', '--out', str(tmp_path/'c.json')]) == 0
    saved = json.loads((tmp_path/'c.json').read_text())
    assert {r['method'] for r in saved['methods']} == {*METHODS, 'bc_sound', 'augmented_cyclegan'}
    assert all(r['loss'] == r['weight'] == 0 and r['bf16'] < .1 for r in saved['methods'])
    assert {r['augmentation'] for r in saved['augmentations']} == set(augmentations()) and len(augmentations()) == 23
    assert all(r['differ'] == 0 for r in saved['augmentations'])

def test_a_device_that_computes_wrongly_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(lib, 'check_methods', lambda d: [dict(method='mixmatch', loss=.5, weight=0., bf16=0.), dict(method='uda', loss=0., weight=0., bf16=0.)])
    monkeypatch.setattr(lib, 'check_augmentations', lambda d: [dict(augmentation='fog', differ=.2, most=9)])
    with pytest.raises(ValueError, match='disagree on mixmatch, fog'): check('cpu', str(tmp_path/'c.json'))

def test_wrong_numbers_are_noticed(monkeypatch):
    real = some_steps
    def wrong(method, device, *a):
        loss, w = real(method, 'cpu', *a)
        return (loss*1.01, w + .1) if device == 'other' else (loss, w)
    monkeypatch.setattr(lib, 'some_steps', wrong)
    r, = check_methods('other', ('supervised',))
    assert r['loss'] > 5e-3 and r['weight'] > .09

def test_the_default_device_is_put_back():
    from fastai.torch_core import default_device, defaults
    was, tf32 = defaults.use_cuda, torch.backends.cudnn.allow_tf32
    with on_device('cpu'): assert default_device().type == 'cpu' and not torch.backends.cudnn.allow_tf32
    assert (defaults.use_cuda, torch.backends.cudnn.allow_tf32) == (was, tf32)

@cuda
def test_cuda_agrees_with_the_cpu(tmp_path): check('cuda', str(tmp_path/'c.json'))

@cuda
@pytest.mark.parametrize('mode', MODES)
def test_all_ways_on_cuda(mode): assert bench_one('mixmatch', noise_images(), mode, 8, .25, 3, 3)['step_s'] > 0
