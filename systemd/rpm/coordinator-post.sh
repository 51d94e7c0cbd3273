# $1: how many versions are installed now.
systemd-sysusers cloison-coordinator.conf >/dev/null 2>&1 || :
systemctl daemon-reload >/dev/null 2>&1 || :
if [ "$1" -eq 1 ]; then
  systemctl --no-reload preset cloison-coordinator.service >/dev/null 2>&1 || :
else
  systemctl try-restart cloison-coordinator.service >/dev/null 2>&1 || :
fi
