#!/usr/bin/env bash
# What the action runs: check the limits here, and compare with the base where there is one.
# Exit status as memplan's: 0 within budget, 1 over budget or regressed, 2 could not answer.
set -uo pipefail

folder=$(mktemp -d)
trap 'git worktree remove --force "$folder/base" >/dev/null 2>&1; rm -rf "$folder"' EXIT

status=0
memplan check -o "$folder/head.json" --comment "$COMMENT_FILE" || status=$?

if [[ -n "${BASE_REF:-}" && -s "$folder/head.json" ]]; then
  prefix=$(git rev-parse --show-prefix)
  if git worktree add --detach --quiet "$folder/base" "$BASE_REF"; then
    # The base's limits are not this change's concern: only its analyses are wanted.
    (cd "$folder/base/$prefix" && GITHUB_STEP_SUMMARY='' memplan check -o "$folder/base.json" --format json >/dev/null) || true
  fi
  if [[ -s "$folder/base.json" ]]; then
    rules=()
    for rule in $FAIL_ON; do rules+=(--fail-on "$rule"); done
    compared=0
    memplan compare "$folder/base.json" "$folder/head.json" "${rules[@]}" --comment "$COMMENT_FILE" || compared=$?
    GITHUB_STEP_SUMMARY='' memplan compare "$folder/base.json" "$folder/head.json" "${rules[@]}" --format sarif > "$SARIF_FILE"
    ((compared > status)) && status=$compared
  else
    echo "::warning title=memplan::the base $BASE_REF could not be analysed; nothing to compare with"
  fi
fi

if [[ -n "${GITHUB_OUTPUT:-}" ]]; then
  {
    echo "comment-file=$PWD/$COMMENT_FILE"
    echo "sarif-file=$PWD/$SARIF_FILE"
  } >> "$GITHUB_OUTPUT"
fi
exit "$status"
