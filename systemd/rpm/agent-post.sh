# $1: how many versions are installed now. Enables the agent at the first; restarts it, if it runs, at an upgrade.
systemctl daemon-reload >/dev/null 2>&1 || :
if [ "$1" -eq 1 ]; then
  systemctl --no-reload preset cloison-agent.service cloison-agent-prepare.service >/dev/null 2>&1 || :
else
  systemctl try-restart cloison-agent.service >/dev/null 2>&1 || :
fi
