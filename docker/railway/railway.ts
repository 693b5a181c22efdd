// A relay on Railway. Railway carries no UDP, so the relay has no STUN and serves
// as a fallback only.
// In the directory of the sources:
//
//   railway init
//   railway config apply --file docker/railway/railway.ts
//   railway up --service derpd
//   railway logs --service derpd        shows the map to paste
//
// derpd detects Railway and takes its name and port in the map from the TCP proxy.
// If `railway tcp-proxy list --service derpd` shows no proxy, create one and deploy
// again:
//
//   railway tcp-proxy create --port 8443 --service derpd
//
// A new proxy has a new port and so needs a new map.
import { defineRailway, project, service, volume } from "railway/iac";

export default defineRailway(() => {
  const data = volume("derpd-data");

  const derpd = service("derpd", {
    build: { builder: "DOCKERFILE", dockerfilePath: "Dockerfile" },
    // Railway requests this path on PORT, with its own host name.
    healthcheck: "/readyz",
    healthcheckTimeout: 60,
    // Two relays cannot share the volume and the address.
    replicas: 1,
    deploy: { restartPolicyType: "ALWAYS" },
    networking: { tcpProxies: { "8443": {} } },
    volumeMounts: { "/data": data },
    env: {
      PORT: "8080",
      // Only root can write to volumes on Railway.
      RAILWAY_RUN_UID: "0",
    },
  });

  return project("derpd", { resources: [derpd, data] });
});
