// A relay on Railway: a fallback, since Railway carries no UDP and so no STUN.
// In the directory of the sources:
//
//   railway init
//   railway config apply --file docker/railway/railway.ts
//   railway up --service derpd
//   railway logs --service derpd        the map to paste is in there
//
// derpd sees that it runs on Railway and takes its name and port in the map
// from the TCP proxy. If `railway tcp-proxy list --service derpd` shows none:
//
//   railway tcp-proxy create --port 8443 --service derpd
//
// and deploy again. Railway keeps the port for the proxy's life: a new proxy
// means a new map.
import { defineRailway, project, service, volume } from "railway/iac";

export default defineRailway(() => {
  const data = volume("derpd-data");

  const derpd = service("derpd", {
    build: { builder: "DOCKERFILE", dockerfilePath: "Dockerfile" },
    // Asked on PORT, by Railway's own host name.
    healthcheck: "/readyz",
    healthcheckTimeout: 60,
    // Two relays cannot share the one volume and the one address.
    replicas: 1,
    deploy: { restartPolicyType: "ALWAYS" },
    networking: { tcpProxies: { "8443": {} } },
    volumeMounts: { "/data": data },
    env: {
      PORT: "8080",
      // Railway mounts volumes for root alone.
      RAILWAY_RUN_UID: "0",
    },
  });

  return project("derpd", { resources: [derpd, data] });
});
