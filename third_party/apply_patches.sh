#!/usr/bin/env bash
# Applies third_party/patches/lmdeploy to LMDeploy. `--help` for how.
set -euo pipefail

readonly here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly patch_dir=$here/patches/lmdeploy
readonly version=0.11.0 # what the patches are for
readonly marker=.sagellm-overlay # in an overlay: we made it, so we may replace it
readonly OK=0 USAGE=2 NOT_FOUND=3 WRONG_VERSION=4 CONFLICT=5 CANNOT_WRITE=6

help() {
    cat <<'HELP'
usage: apply_patches.sh [--check | --reverse] [--overlay DIR | --target DIR]

Patches LMDeploy: the submodule third_party/lmdeploy where it is checked out, else the package installed for
$PYTHON (python3). All patches are tried on a copy first: either all of them are applied or none. Running it again
changes nothing.

  --overlay DIR  patch a copy in DIR, made afresh unless it is up to date, and leave the original alone; use it
                 with PYTHONPATH=DIR
  --target DIR   patch the tree in DIR (the folder that holds lmdeploy/)
  --check        write nothing; print each patch as: name <tab> state <tab> what is wrong. The states are `applied`,
                 `not applied` (it would apply), `half applied` and `does not apply`
  --reverse      take the patches out again

exit codes: 0 done, or --check found no patch in the way · 2 wrong usage · 3 no LMDeploy or no tool · 4 wrong version
            5 a patch is half applied or does not apply · 6 cannot write
HELP
}

fail() { # exit_code message...
    echo "apply_patches.sh: ${*:2}" >&2
    exit "$1"
}

parse_arguments() {
    mode=apply overlay='' target=''
    while (($#)); do
        case $1 in
        --check | --reverse)
            [[ $mode == apply ]] || fail $USAGE "--check and --reverse exclude each other"
            mode=${1#--}
            ;;
        --overlay | --target)
            [[ -n ${2:-} ]] || fail $USAGE "$1 wants a directory"
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        -h | --help) help && exit $OK ;;
        *) fail $USAGE "unknown argument '$1'; see --help" ;;
        esac
        shift
    done
    [[ -z $overlay || -z $target ]] || fail $USAGE "--overlay and --target exclude each other"
}

installed_package() { # prints the folder that holds the installed lmdeploy/; imports nothing of it
    # -E and -P: neither an overlay on PYTHONPATH nor a folder in the working directory
    "${PYTHON:-python3}" -EP -c '
import importlib.util, pathlib
spec = importlib.util.find_spec("lmdeploy")
if spec is not None and spec.origin is not None:
    print(pathlib.Path(spec.origin).parent.parent)'
}

original_tree() { # prints the folder that holds the submodule's or the package's lmdeploy/
    local tree=$here/lmdeploy
    [[ -f $tree/lmdeploy/version.py ]] || tree=$(installed_package) || tree=''
    [[ -n $tree ]] || fail $NOT_FOUND "no LMDeploy: third_party/lmdeploy is not checked out, and ${PYTHON:-python3}" \
        "has no lmdeploy; pip install --no-deps lmdeploy==$version"
    echo "$tree"
}

check_version() { # tree
    local file=$1/lmdeploy/version.py found
    [[ -f $file ]] || fail $NOT_FOUND "no lmdeploy/version.py in $1"
    found=$(sed -n "s/^__version__ = '\(.*\)'.*/\1/p" "$file")
    [[ $found == "$version" ]] || fail $WRONG_VERSION "$1 has LMDeploy ${found:-of unknown version}, the patches are for $version"
}

touched_files() { sed -n 's|^+++ b/||p' "${patches[@]}" | sort -u; }

copy_touched_files() { # from to
    local file
    while read -r file; do
        [[ ! -f $1/$file ]] || { mkdir -p "$2/$(dirname "$file")" && cp -p "$1/$file" "$2/$file"; }
    done < <(touched_files)
}

run_patch() { # tree patch_file patch_options...
    patch --force --no-backup-if-mismatch --fuzz=0 --strip=1 --reject-file=- --directory="$1" --input="$2" "${@:3}"
}

count_hunks_in() { # tree patch_file: prints how many of the patch's hunks the tree has
    local failed
    failed=$({ run_patch "$1" "$2" --reverse --dry-run 2>&1 || true; } |
        sed -nE 's/^([0-9]+) out of [0-9]+ hunks? (FAILED|ignored).*/\1/p' | paste -sd+)
    echo $(($(count_hunks "$2") - (${failed:-0})))
}

count_hunks() { grep -c '^@@ ' "$1"; }

conflicts() { # what patch said: prints the files whose hunks failed
    awk '/^checking file /{file = $3} /^\|\+\+\+ b\//{file = substr($2, 3)}
         /FAILED|ignored/ && !seen[file]++ {printf "%s%s", sep, file; sep = ", "}'
}

# Fills state[i] and detail[i] of every patch; leaves the tree without patches in $scratch/stock and with all of them in
# $scratch/patched. Patches come off in reverse order, so that each is looked at in the tree it was written for.
inspect() { # tree
    local i found said stock=$scratch/stock patched=$scratch/patched
    rm -rf "$stock" "$patched"
    mkdir "$stock"
    copy_touched_files "$1" "$stock"
    for ((i = ${#patches[@]} - 1; i >= 0; i--)); do
        state[i]='not applied' detail[i]=''
        if run_patch "$stock" "${patches[i]}" --reverse --dry-run >/dev/null 2>&1; then
            state[i]=applied
            run_patch "$stock" "${patches[i]}" --reverse >/dev/null
            continue
        fi
        found=$(count_hunks_in "$stock" "${patches[i]}")
        ((found > 0)) || continue
        state[i]='half applied' detail[i]="$found of $(count_hunks "${patches[i]}") changes are in"
        run_patch "$stock" "${patches[i]}" --reverse >/dev/null 2>&1 || true # so that the patches below it can be judged
    done
    cp -rp "$stock" "$patched"
    for i in "${!patches[@]}"; do
        if said=$(run_patch "$patched" "${patches[i]}" --dry-run 2>&1); then
            run_patch "$patched" "${patches[i]}" >/dev/null
        elif [[ ${state[i]} == 'not applied' ]]; then
            state[i]='does not apply' detail[i]="conflict in $(conflicts <<<"$said")"
        fi
    done
}

print_states() {
    local i
    for i in "${!patches[@]}"; do
        printf '%s\t%s\t%s\n' "$(basename "${patches[i]}" .patch)" "${state[i]}" "${detail[i]}"
    done
}

all_states_are() { # state...
    local found wanted
    for found in "${state[@]}"; do
        for wanted in "$@"; do [[ $found != "$wanted" ]] || continue 2; done
        return 1
    done
}

refuse_conflicts() { # tree
    all_states_are applied 'not applied' && return
    print_states >&2
    fail $CONFLICT "$1 was changed by something else; nothing was written. Restore it (pip install --force-reinstall" \
        "--no-deps lmdeploy==$version, or git checkout in the submodule) and try again"
}

install_files() { # from to: makes the touched files in `to` those in `from`; each is replaced in one step
    local file
    trap '' INT TERM # a half patched tree is worse than a late interrupt
    while read -r file; do
        if [[ ! -f $1/$file ]]; then
            rm -f "$2/$file"
        elif ! cmp -s "$1/$file" "$2/$file"; then
            cp -p "$1/$file" "$2/$file.new" && mv -f "$2/$file.new" "$2/$file"
        fi
    done < <(touched_files)
    trap - INT TERM
}

check_writable() { # tree
    local file
    while read -r file; do
        [[ -w $1/$(dirname "$file") ]] || fail $CANNOT_WRITE "cannot write to $1/$(dirname "$file"); try --overlay DIR"
    done < <(touched_files)
}

overlay_is_current() {
    [[ -f $overlay/$marker && -f $overlay/lmdeploy/version.py ]] || return 1
    inspect "$overlay"
    all_states_are applied
}

renew_overlay() { # a fresh copy of the original, which is known to take the patches
    local original
    original=$(original_tree)
    check_version "$original"
    inspect "$original"
    refuse_conflicts "$original"
    if [[ -e $overlay/lmdeploy && ! -f $overlay/$marker ]]; then
        fail $CANNOT_WRITE "$overlay/lmdeploy exists and is not ours; choose an empty directory"
    fi
    mkdir -p "$overlay" && touch "$overlay/$marker" || fail $CANNOT_WRITE "cannot write to $overlay"
    rm -rf "$overlay/lmdeploy"
    mkdir "$overlay/lmdeploy"
    # lib is large and never patched; -p keeps the times, so bytecode stays valid
    find "$original/lmdeploy" -mindepth 1 -maxdepth 1 ! -name lib -exec cp -rp -t "$overlay/lmdeploy" {} +
    [[ ! -d $original/lmdeploy/lib ]] || ln -s "$original/lmdeploy/lib" "$overlay/lmdeploy/lib"
}

export LC_ALL=C # patch's messages are read here
parse_arguments "$@"
command -v patch >/dev/null || fail $NOT_FOUND "the patch command is missing; install the package 'patch'"
patches=("$patch_dir"/[0-9]*.patch)
declare -a state detail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if [[ -z $overlay ]]; then
    tree=${target:-$(original_tree)}
else
    tree=$overlay
    [[ $mode != apply ]] || overlay_is_current || renew_overlay
    [[ -f $tree/lmdeploy/version.py ]] || fail $NOT_FOUND "no overlay in $overlay; make one with --overlay $overlay"
fi
check_version "$tree"
inspect "$tree"

case $mode in
check)
    echo "tree"$'\t'"$(cd "$tree" && pwd)/lmdeploy"$'\t'"$version"
    print_states
    all_states_are applied 'not applied' || exit $CONFLICT
    ;;
apply)
    if all_states_are applied; then
        echo "already applied: ${#patches[@]} patches in $tree/lmdeploy"
    else
        refuse_conflicts "$tree"
        check_writable "$tree"
        install_files "$scratch/patched" "$tree"
        echo "applied: ${#patches[@]} patches in $tree/lmdeploy"
    fi
    ;;
reverse)
    if all_states_are 'not applied'; then
        echo "nothing to reverse in $tree/lmdeploy"
    else
        refuse_conflicts "$tree"
        check_writable "$tree"
        install_files "$scratch/stock" "$tree"
        echo "reversed: ${#patches[@]} patches in $tree/lmdeploy"
    fi
    ;;
esac
