#!/usr/bin/env bash
# What the action runs: analyse the base where there is one, then hold this change against its limits and that base.
# Exit status as memplan's: 0 within budget, 1 over budget or regressed, 2 could not answer.
set -uo pipefail

folder=$(mktemp -d)
trap 'git worktree remove --force "$folder/base" >/dev/null 2>&1; rm -rf "$folder"' EXIT

against=()
if [[ -n "${BASE_REF:-}" ]]; then
  prefix=$(git rev-parse --show-prefix)
  if git worktree add --detach --quiet "$folder/base" "$BASE_REF"; then
    # The base's own limits are not this change's concern: only its analyses are wanted, and no verdict of it.
    (cd "$folder/base/$prefix" && GITHUB_STEP_SUMMARY='' memplan check -o "$folder/base.json" --format json) >/dev/null || true
  fi
  if [[ -s "$folder/base.json" ]]; then
    against=(--base "$folder/base.json")
  else
    echo "::warning title=memplan::the base $BASE_REF could not be analysed; nothing to compare with"
  fi
fi
for rule in ${FAIL_ON:-}; do against+=(--fail-on "$rule"); done

memplan check "${against[@]}" --comment "$COMMENT_FILE" --sarif "$SARIF_FILE"
status=$?

if [[ -n "${GITHUB_OUTPUT:-}" ]]; then
  {
    echo "comment-file=$PWD/$COMMENT_FILE"
    echo "sarif-file=$PWD/$SARIF_FILE"
  } >> "$GITHUB_OUTPUT"
fi
exit "$status"
