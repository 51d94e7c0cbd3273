# $1: how many versions stay. At the last, the coordinator stops; the mesh's keys and database stay.
if [ "$1" -eq 0 ]; then
  systemctl --no-reload disable --now cloison-coordinator.service >/dev/null 2>&1 || :
fi
