# Sourced by the scripts beside it: a part of a run, for so many seconds at most; what it says goes to $log too.
part() { # seconds, name, command
    local seconds=$1 name=$2 began=$SECONDS
    shift 2
    echo "== $name" | tee -a "$log"
    timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$log"
    echo "== $name: ended with ${PIPESTATUS[0]} after $((SECONDS - began)) s" | tee -a "$log"
}
