# $1: how many versions stay. At the last, the agent stops; `cloison-agent leave`, run before, would have removed state, tables and routes.
if [ "$1" -eq 0 ]; then
  systemctl --no-reload disable --now cloison-agent.service cloison-agent-prepare.service >/dev/null 2>&1 || :
fi
