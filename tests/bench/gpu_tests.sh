#!/bin/sh
# The kernels' tests on a GPU, six files at a time: the end of the log of each that fails, how many
# passed, and last of all GREEN or RED. Ends with 1 for RED.
#     sh tests/bench/gpu_tests.sh FOLDER_FOR_LOGS [FILE ...]
logs=$1
shift
[ $# -gt 0 ] || set -- tests/kernels/test_*.py tests/tasks/modeling/test_joint_weights.py \
    tests/tasks/modeling/test_recompute.py
mkdir -p "$logs"
printf '%s\n' "$@" |
    xargs -P 6 -I {} sh -c 'log='"$logs"'/$(basename {}).log
        python3 -m pytest -q -m gpu -p no:cacheprovider {} > "$log" 2>&1
        case $? in 0 | 5) ;; *) echo "RED {}" >> "$log"; tail -30 "$log" ;; esac'
grep -h -o "[0-9]* passed" "$logs"/test_*.log | awk '{ all += $1 } END { print all " passed" }'
if grep -q "^RED" "$logs"/test_*.log; then echo RED; exit 1; else echo GREEN; fi
