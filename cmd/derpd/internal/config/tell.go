package config

// TellEnv is what clients are told about the relay.
type TellEnv struct {
	TellClients string `envconfig:"DERP_TELL_CLIENTS" default:"true" desc:"send refused clients the reason, which tailscale status then shows, and connected clients a warning before the relay stops or its certificate ends" zh:"把拒绝原因发给被拒绝的客户端（tailscale status 会显示），并在中继停止或证书到期之前提醒已连接的客户端"`
}
