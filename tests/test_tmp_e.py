import pytest,subprocess
from harness import *
@pytest.mark.parametrize("n", range(60))
def test_plain(job,n):
    ranks=job.world("train.py",2,AUTOTEARDOWN_LOG="debug")
    for r in ranks: r.wait_for("step 3$")
    ranks[0].signal()
    ranks[1].signalled=ranks[0].signalled
    time.sleep(0.7)
    if not ranks[1].said:
        for r in ranks:
            p=subprocess.run(f"gdb -p {r.pid} -batch -ex 'thread apply all bt 30'",shell=True,capture_output=True,text=True)
            open(f'/tmp/e_gdb_hear_{r.pid}','w').write(p.stdout+p.stderr)
        raise AssertionError(ranks[0].story()+ranks[1].story())
    assert [r.outlast() for r in ranks]==[0,143], ranks[0].story()+ranks[1].story()
