// For pm2, from the directory that holds models.toml (and `.env`, where there is one):
//
//   pm2 start PATH/ecosystem.config.cjs --only targon-engine      or --only targon-verifier
//
// The environment of that command goes to the program; `env` below wins over it, and both win over
// `.env`. $TARGON_ENGINE names a binary elsewhere.

"use strict";

const app = {
  script: process.env.TARGON_ENGINE || "/usr/local/bin/targon-engine",
  interpreter: "none", // a program, not a script of node
  cwd: process.cwd(),
  // 1 is the user's to mend: trying again changes nothing. 0 is not listed: pm2 takes a process
  // that a signal ended (out of memory, a crash) for one that exited with 0, and that one must come
  // back.
  stop_exit_codes: [1],
  // 1 s, then half as much again each time, 15 s at most.
  exp_backoff_restart_delay: 1000,
  // A program that ends within a minute of its start ten times in a row is given up.
  min_uptime: "60s",
  max_restarts: 10,
  // pm2 sends SIGINT, which drains like SIGTERM. More than TARGON_SHUTDOWN_TIMEOUT (30 s).
  kill_timeout: 45_000,
  merge_logs: true,
  vizion: false, // no look at git
};

const miner = {
  // TARGON_NETUID: "4",
  // BT_WALLET_NAME: "default",
  // BT_WALLET_HOTKEY: "default",
  // BT_SUBTENSOR_NETWORK: "finney",
  // BT_AXON_PORT: "8091",
};

module.exports = {
  apps: [
    { ...app, name: "targon-engine", args: ["serve"], env: miner },
    // A port of its own, so that both can run.
    { ...app, name: "targon-verifier", args: ["verifier"], env: { TARGON_PORT: "8001" } },
  ],
};
