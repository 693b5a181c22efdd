package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"go.yaml.in/yaml/v3"

	"derpd/cmd/derpd/internal/config"
	"derpd/cmd/derpd/internal/host"
	"derpd/internal/testkit"
)

// repository is the path of a file of this repository.
func repository(parts ...string) string {
	return filepath.Join(append([]string{"..", "..", "..", ".."}, parts...)...)
}

// contents reads a file of this repository.
func contents(t *testing.T, parts ...string) string {
	t.Helper()
	data, err := os.ReadFile(repository(parts...))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// program returns the path of a program. The test is skipped on a machine
// without the program.
func program(t *testing.T, names ...string) string {
	t.Helper()
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skipf("no %s on this machine", names[0])
	return ""
}

// output runs a program that must succeed, and returns its output.
func output(t *testing.T, dir string, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	return string(out)
}

// flyService has the keys of a service that docker/fly.toml uses
// (fly.io/docs/reference/configuration).
type flyService struct {
	Protocol     string `toml:"protocol"`
	InternalPort int    `toml:"internal_port"`
	AutoStop     string `toml:"auto_stop_machines"`
	AutoStart    bool   `toml:"auto_start_machines"`
	MinMachines  int    `toml:"min_machines_running"`
	Ports        []struct {
		Port              int      `toml:"port"`
		Handlers          []string `toml:"handlers"` // raw TCP if empty
		ProxyProtoOptions struct {
			Version string `toml:"version"`
		} `toml:"proxy_proto_options"`
	} `toml:"ports"`
	Concurrency struct {
		Type      string `toml:"type"`
		SoftLimit int    `toml:"soft_limit"`
	} `toml:"concurrency"`
}

type flyConfig struct {
	App           string `toml:"app"`
	PrimaryRegion string `toml:"primary_region"`
	KillSignal    string `toml:"kill_signal"`
	KillTimeout   int    `toml:"kill_timeout"`
	Build         struct {
		Dockerfile string `toml:"dockerfile"`
	} `toml:"build"`
	Deploy struct {
		Strategy string `toml:"strategy"`
	} `toml:"deploy"`
	Env    map[string]string `toml:"env"`
	Mounts struct {
		Source      string `toml:"source"`
		Destination string `toml:"destination"`
		InitialSize string `toml:"initial_size"`
	} `toml:"mounts"`
	Services []flyService `toml:"services"`
	Checks   map[string]struct {
		Type        string `toml:"type"`
		Port        int    `toml:"port"`
		Method      string `toml:"method"`
		Path        string `toml:"path"`
		Interval    string `toml:"interval"`
		Timeout     string `toml:"timeout"`
		GracePeriod string `toml:"grace_period"`
	} `toml:"checks"`
	VM []struct {
		Size   string `toml:"size"`
		Memory string `toml:"memory"`
	} `toml:"vm"`
}

// TestFlyTOML compares the ports of fly.toml with the ports that derpd chooses
// on Fly.io.
func TestFlyTOML(t *testing.T) {
	var f flyConfig
	meta, err := toml.Decode(contents(t, "docker", "fly.toml"), &f)
	if err != nil {
		t.Fatal(err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		t.Errorf("unknown keys %v", unknown)
	}
	c, err := config.Load(append(strings.Split(onFly, " "), "DERP_DATA_DIR="+t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	at := configuredPorts(c.Listen)
	n, _ := publicNode(c, at, "", host.Addresses{}, c.Open())
	want := map[string][2]int{"tcp 443": {n.Port, at.https}, "tcp 80": {n.HTTPPort, at.http}, "udp 3478": {n.STUNPort, at.stun}}
	if len(f.Services) != len(want) {
		t.Errorf("%d services, want %d", len(f.Services), len(want))
	}
	for _, s := range f.Services {
		for name, ports := range want {
			if len(s.Ports) == 1 && strings.HasPrefix(name, s.Protocol) && s.Ports[0].Port == ports[0] && s.InternalPort == ports[1] {
				delete(want, name)
			}
		}
		if s.AutoStop != "off" || s.MinMachines != 1 {
			t.Errorf("service %+v may be stopped", s)
		}
		if s.Protocol == "tcp" && (s.Concurrency.Type != "connections" || s.Concurrency.SoftLimit < 1000) {
			t.Errorf("service %+v is full too early", s)
		}
		if s.Protocol == "udp" && s.Ports[0].Port != s.InternalPort {
			t.Errorf("service %+v: UDP keeps its port on Fly.io", s)
		}
	}
	if len(want) > 0 {
		t.Errorf("no service for %v", want)
	}
	if check := f.Checks["ready"]; check.Port != config.PortOf(c.Listen.Health) || check.Path != "/readyz" {
		t.Errorf("check %+v does not ask %s", check, c.Listen.Health)
	}
	if f.Mounts.Destination != "/data" {
		t.Errorf("the volume is at %s, DERP_DATA_DIR is /data", f.Mounts.Destination)
	}
}

// TestFlyTOMLWithAddresses uncomments the optional part of fly.toml. With it
// Fly.io's proxy sends PROXY headers to both TCP ports, and derpd trusts the
// proxy.
func TestFlyTOMLWithAddresses(t *testing.T) {
	text := strings.NewReplacer("# [env]", "[env]", "#   DERP_", "  DERP_", "# handlers", "handlers", "# proxy_proto_options", "proxy_proto_options").
		Replace(contents(t, "docker", "fly.toml"))
	var f flyConfig
	meta, err := toml.Decode(text, &f)
	if err != nil {
		t.Fatal(err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		t.Errorf("unknown keys %v", unknown)
	}
	for _, s := range f.Services {
		port := s.Ports[0]
		if want := s.Protocol == "tcp"; slices.Equal(port.Handlers, []string{"proxy_proto"}) != want || (port.ProxyProtoOptions.Version == "v2") != want {
			t.Errorf("%s port %+v", s.Protocol, port)
		}
	}
	env := append(strings.Split(onFly, " "), "DERP_DATA_DIR="+t.TempDir())
	for name, value := range f.Env {
		env = append(env, name+"="+value)
	}
	c, err := config.Load(env)
	if err != nil {
		t.Fatal(err)
	}
	if !c.Proxies.ProxyProtocol || len(c.Proxies.Trusted) != 1 || c.Proxies.Trusted[0].String() != "172.16.0.0/12" {
		t.Errorf("PROXY protocol %t, trusts %v", c.Proxies.ProxyProtocol, c.Proxies.Trusted)
	}
}

// TestRailwayTS asserts that railway.ts and derpd agree: on the ports, the path of
// the health check, the volume and the user. The functions of Railway's SDK are
// replaced by ones that return their arguments, and the field names are copied
// from the SDK's documentation. The test therefore does not show that Railway
// accepts the file.
func TestRailwayTS(t *testing.T) {
	node := program(t, "node")
	dir := t.TempDir()
	file("node_modules/railway/package.json", `{"name": "railway", "type": "module", "exports": {"./iac": "./iac.js"}}`)(t, dir)
	file("node_modules/railway/iac.js", `
export const defineRailway = (program) => program;
export const volume = (name, config) => ({ name, ...config });
export const service = (name, config) => ({ name, ...config });
export const project = (name, definition) => ({ name, ...definition });
`)(t, dir)
	// railway.ts has no type annotations, so it runs as JavaScript.
	file("railway.mjs", contents(t, "docker", "railway", "railway.ts"))(t, dir)
	file("print.mjs", `import program from "./railway.mjs"; console.log(JSON.stringify(program({})));`)(t, dir)
	var project struct {
		Name      string `json:"name"`
		Resources []struct {
			Name  string `json:"name"`
			Build *struct {
				Builder        string `json:"builder"`
				DockerfilePath string `json:"dockerfilePath"`
			} `json:"build"`
			Healthcheck        string `json:"healthcheck"`
			HealthcheckTimeout int    `json:"healthcheckTimeout"`
			Replicas           int    `json:"replicas"`
			Deploy             struct {
				RestartPolicyType string `json:"restartPolicyType"`
			} `json:"deploy"`
			Networking struct {
				TCPProxies map[string]struct{} `json:"tcpProxies"`
			} `json:"networking"`
			VolumeMounts map[string]struct {
				Name string `json:"name"`
			} `json:"volumeMounts"`
			Env map[string]string `json:"env"`
		} `json:"resources"`
	}
	dec := json.NewDecoder(strings.NewReader(output(t, dir, nil, node, "print.mjs")))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&project); err != nil {
		t.Fatal(err)
	}
	if len(project.Resources) != 2 {
		t.Fatalf("got %+v, want a service and a volume", project)
	}
	s := project.Resources[0]
	env := append(strings.Split(onRailway, " "), "PORT="+s.Env["PORT"], "DERP_DATA_DIR="+t.TempDir())
	c, err := config.Load(testkit.LastOfEach(env))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := s.Networking.TCPProxies[strconv.Itoa(config.PortOf(c.Listen.HTTPS))]; !ok || len(s.Networking.TCPProxies) != 1 {
		t.Errorf("the TCP proxies %v do not lead to %s", s.Networking.TCPProxies, c.Listen.HTTPS)
	}
	// Railway asks for the health check on PORT.
	if strconv.Itoa(config.PortOf(c.Listen.Health)) != s.Env["PORT"] || s.Healthcheck != "/readyz" {
		t.Errorf("the health check asks %s on port %s, derpd answers on %s", s.Healthcheck, s.Env["PORT"], c.Listen.Health)
	}
	if s.VolumeMounts["/data"].Name != project.Resources[1].Name || s.Replicas != 1 || s.Env["RAILWAY_RUN_UID"] != "0" {
		t.Errorf("service %+v: want one replica that can write to the volume", s)
	}
}

// TestSystemdUnit checks the unit with systemd's own tools, including the score
// of its security options.
func TestSystemdUnit(t *testing.T) {
	analyze := program(t, "systemd-analyze")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	// systemd-analyze refuses a unit whose program does not exist.
	unit := strings.ReplaceAll(contents(t, "docker", "derpd.service"), "ExecStart=/usr/local/bin/derpd", "ExecStart="+self)
	file("derpd.service", unit)(t, dir)
	if out := output(t, dir, nil, analyze, "verify", "./derpd.service"); strings.Contains(out, "derpd.service") {
		t.Error(out)
	}
	out := output(t, dir, nil, analyze, "security", "--offline=true", "--threshold=20", "--no-pager", "./derpd.service")
	_, score, _ := strings.Cut(out, "Overall")
	t.Log("overall" + strings.TrimSpace(score))
}

// TestSystemdUpdateUnits checks the units of the nightly update, which internal/compat
// runs, with systemd's own tools.
func TestSystemdUpdateUnits(t *testing.T) {
	analyze := program(t, "systemd-analyze")
	script, err := filepath.Abs(repository("docker", "derpd-update"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	unit := strings.ReplaceAll(contents(t, "docker", "derpd-update.service"), "ExecStart=/usr/local/sbin/derpd-update", "ExecStart="+script)
	file("derpd-update.service", unit)(t, dir)
	file("derpd-update.timer", contents(t, "docker", "derpd-update.timer"))(t, dir)
	if out := output(t, dir, nil, analyze, "verify", "./derpd-update.service", "./derpd-update.timer"); strings.Contains(out, "derpd-update") {
		t.Error(out)
	}
	output(t, dir, nil, analyze, "security", "--offline=true", "--threshold=55", "--no-pager", "./derpd-update.service")
}

// TestQuadlet runs podman's generator on the quadlet.
func TestQuadlet(t *testing.T) {
	quadlet := program(t, "/usr/libexec/podman/quadlet", "quadlet")
	dir := t.TempDir()
	file("derpd.container", contents(t, "docker", "derpd.container"))(t, dir)
	out := output(t, dir, []string{"QUADLET_UNIT_DIRS=" + dir}, quadlet, "-dryrun")
	for _, want := range []string{`--health-cmd "[\"/derpd\",\"healthcheck\"]"`, "--read-only", "--cap-drop all", "--label io.containers.autoupdate=local", "-v derpd:/data", "--publish 0.0.0.0:3478:3478/udp"} {
		if !strings.Contains(out, want) {
			t.Errorf("podman's unit lacks %s:\n%s", want, out)
		}
	}
}

// The kube types are the parts of Kubernetes' types that the manifest uses. A
// misspelt field fails the test; an old cluster would drop it silently.
type (
	kubeObject struct {
		APIVersion string `yaml:"apiVersion"`
		Kind       string `yaml:"kind"`
		Metadata   struct {
			Name      string            `yaml:"name"`
			Namespace string            `yaml:"namespace"`
			Labels    map[string]string `yaml:"labels"`
		} `yaml:"metadata"`
		Spec yaml.Node `yaml:"spec"`
	}
	kubeClaim struct {
		AccessModes []string `yaml:"accessModes"`
		Resources   struct {
			Requests map[string]string `yaml:"requests"`
		} `yaml:"resources"`
	}
	kubeDeployment struct {
		Replicas int `yaml:"replicas"`
		Strategy struct {
			Type string `yaml:"type"`
		} `yaml:"strategy"`
		Selector struct {
			MatchLabels map[string]string `yaml:"matchLabels"`
		} `yaml:"selector"`
		Template struct {
			Metadata struct {
				Labels map[string]string `yaml:"labels"`
			} `yaml:"metadata"`
			Spec kubePod `yaml:"spec"`
		} `yaml:"template"`
	}
	kubePod struct {
		NodeSelector                  map[string]string `yaml:"nodeSelector"`
		HostNetwork                   bool              `yaml:"hostNetwork"`
		DNSPolicy                     string            `yaml:"dnsPolicy"`
		AutomountServiceAccountToken  bool              `yaml:"automountServiceAccountToken"`
		EnableServiceLinks            bool              `yaml:"enableServiceLinks"`
		TerminationGracePeriodSeconds int               `yaml:"terminationGracePeriodSeconds"`
		SecurityContext               struct {
			RunAsNonRoot   bool `yaml:"runAsNonRoot"`
			RunAsUser      int  `yaml:"runAsUser"`
			RunAsGroup     int  `yaml:"runAsGroup"`
			FSGroup        int  `yaml:"fsGroup"`
			SeccompProfile struct {
				Type string `yaml:"type"`
			} `yaml:"seccompProfile"`
		} `yaml:"securityContext"`
		Containers []kubeContainer `yaml:"containers"`
		Volumes    []struct {
			Name                  string `yaml:"name"`
			PersistentVolumeClaim struct {
				ClaimName string `yaml:"claimName"`
			} `yaml:"persistentVolumeClaim"`
		} `yaml:"volumes"`
	}
	kubeContainer struct {
		Name  string `yaml:"name"`
		Image string `yaml:"image"`
		Env   []struct {
			Name  string `yaml:"name"`
			Value string `yaml:"value"`
		} `yaml:"env"`
		SecurityContext struct {
			AllowPrivilegeEscalation bool `yaml:"allowPrivilegeEscalation"`
			ReadOnlyRootFilesystem   bool `yaml:"readOnlyRootFilesystem"`
			Capabilities             struct {
				Drop []string `yaml:"drop"`
			} `yaml:"capabilities"`
		} `yaml:"securityContext"`
		Resources struct {
			Requests map[string]string `yaml:"requests"`
		} `yaml:"resources"`
		VolumeMounts []struct {
			Name      string `yaml:"name"`
			MountPath string `yaml:"mountPath"`
		} `yaml:"volumeMounts"`
		ReadinessProbe kubeProbe `yaml:"readinessProbe"`
		LivenessProbe  kubeProbe `yaml:"livenessProbe"`
	}
	kubeProbe struct {
		HTTPGet struct {
			Host string `yaml:"host"`
			Port int    `yaml:"port"`
			Path string `yaml:"path"`
		} `yaml:"httpGet"`
		PeriodSeconds  int `yaml:"periodSeconds"`
		TimeoutSeconds int `yaml:"timeoutSeconds"`
	}
)

func decodeStrictly(t *testing.T, text []byte, into any) {
	t.Helper()
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(into); err != nil {
		t.Fatal(err)
	}
}

func TestKubernetesManifest(t *testing.T) {
	var kinds []string
	claims := make(map[string]bool)
	var d kubeDeployment
	dec := yaml.NewDecoder(strings.NewReader(contents(t, "docker", "kubernetes.yaml")))
	dec.KnownFields(true)
	for {
		var object kubeObject
		if err := dec.Decode(&object); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		kinds = append(kinds, object.APIVersion+" "+object.Kind)
		spec, err := yaml.Marshal(&object.Spec)
		if err != nil {
			t.Fatal(err)
		}
		switch object.Kind {
		case "PersistentVolumeClaim":
			decodeStrictly(t, spec, new(kubeClaim))
			claims[object.Metadata.Name] = true
		case "Deployment":
			decodeStrictly(t, spec, &d)
		}
	}
	if want := []string{"v1 Namespace", "v1 PersistentVolumeClaim", "apps/v1 Deployment"}; !slices.Equal(kinds, want) {
		t.Fatalf("got %q, want %q", kinds, want)
	}
	pod := d.Template.Spec
	if d.Replicas != 1 || d.Strategy.Type != "Recreate" || !pod.HostNetwork || len(pod.Containers) != 1 || len(pod.Volumes) != 1 ||
		!claims[pod.Volumes[0].PersistentVolumeClaim.ClaimName] || d.Selector.MatchLabels["app"] != d.Template.Metadata.Labels["app"] {
		t.Fatalf("got %+v", d)
	}
	container := pod.Containers[0]
	env := []string{"DERP_DATA_DIR=" + t.TempDir()}
	for _, v := range container.Env {
		env = append(env, v.Name+"="+v.Value)
	}
	c, err := config.Load(env)
	if err != nil {
		t.Fatal(err)
	}
	for _, probe := range []kubeProbe{container.ReadinessProbe, container.LivenessProbe} {
		if probe.HTTPGet.Port != config.PortOf(c.Listen.Admin) || probe.HTTPGet.Host != "127.0.0.1" {
			t.Errorf("probe %+v does not ask %s", probe, c.Listen.Admin)
		}
	}
	if config.PortOf(c.Listen.HTTPS) < 1024 || container.VolumeMounts[0].MountPath != "/data" {
		t.Errorf("uid %d cannot listen on %s, or the volume is elsewhere: %+v", pod.SecurityContext.RunAsUser, c.Listen.HTTPS, container.VolumeMounts)
	}
}
